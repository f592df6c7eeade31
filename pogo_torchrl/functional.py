"""The pure maths of POGO: tensors in, tensors out, one equation a function.

Nothing here knows of TensorDicts, networks or devices. Leading dimensions ``*B`` are free;
the last dimension is the action's. Source: "Policy Optimization as a Gradient Flow in Offline
Reinforcement Learning" (POGO); the critic's target is TD3's (Fujimoto et al., 2018, section 5.3).
"""

from __future__ import annotations

from torch import Tensor

Q_NORMALIZATIONS = ("mean_abs", None)
"""Accepted values of ``q_normalization``, see :func:`q_scale`."""


def smoothed_target_action(
    action: Tensor, noise: Tensor, low: Tensor, high: Tensor, *, sigma: float, clip: float
) -> Tensor:
    r"""Target-policy smoothing of TD3, the noise in units of half the action range.

    .. math::
        a' = \mathrm{clip}\big(\pi_0(s', z') +
             \tfrac{high - low}{2}\,\mathrm{clip}(\sigma n, -c, c),\; low,\; high\big)

    Args:
        action: :math:`\pi_0(s', z')`, shape ``[*B, d]``.
        noise: standard normal draws :math:`n`, shape ``[*B, d]``.
        low: lower action bound, broadcastable to ``[d]``.
        high: upper action bound, broadcastable to ``[d]``.
        sigma: standard deviation of the smoothing noise.
        clip: :math:`c`, the largest magnitude of the noise.

    Returns:
        The smoothed action, shape ``[*B, d]``, inside the bounds.

    Example:
        >>> import torch
        >>> low, high = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> a = torch.tensor([[0.0], [0.9]])
        >>> n = torch.tensor([[1.0], [9.0]])
        >>> smoothed_target_action(a, n, low, high, sigma=0.2, clip=0.5).flatten().tolist()
        [0.20000000298023224, 1.0]
    """
    half_range = (high - low) / 2
    return (action + half_range * (sigma * noise).clamp(-clip, clip)).clamp(low, high)


def td_target(reward: Tensor, terminated: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    r"""One-step target :math:`y = r + \gamma\,(1 - terminated)\,\min(Q_1, Q_2)(s', a')`.

    A time-out is not a terminal state: it must not be marked in ``terminated``.
    :class:`~pogo_torchrl.POGOLoss` computes this through TorchRL's value estimators, of which the
    default, TD(0), equals this function; it stands here as the reference.

    Args:
        reward: shape ``[*B]``.
        terminated: boolean, shape ``[*B]``.
        next_value: the smaller of the target critics' values, shape ``[*B]``.
        gamma: discount factor per step.

    Returns:
        Targets, shape ``[*B]``.

    Example:
        >>> import torch
        >>> end = torch.tensor([False, True])
        >>> td_target(torch.ones(2), end, torch.full((2,), 10.0), gamma=0.5).tolist()
        [6.0, 1.0]
    """
    return reward + gamma * (~terminated).to(next_value.dtype) * next_value


def to_unit_box(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map actions linearly from their bounds to [-1, 1] (the identity for D4RL's tasks).

    Distances between policies are computed there, so that ``w2_weights`` and ``blur`` mean the
    same for every action space.

    Example:
        >>> import torch
        >>> low, high = torch.tensor(0.0), torch.tensor(4.0)
        >>> to_unit_box(torch.tensor([0.0, 2.0, 4.0]), low, high).tolist()
        [-1.0, 0.0, 1.0]
    """
    return (2 * action - (high + low)) / (high - low)


def l2_distance(action: Tensor, data_action: Tensor) -> Tensor:
    r"""Distance of actor 0 to the data: :math:`D_0(s) = \frac1d \sum_k (\pi_0(s,z) - a)_k^2`.

    The Wasserstein-2 distance to a point mass is the L2 distance; the mean over action dimensions
    (not the sum) is the scale that the published ``w2_weights`` are tuned to.

    Args:
        action: :math:`\pi_0(s, z)` in the unit box, shape ``[*B, d]``.
        data_action: the dataset's action in the unit box, shape ``[*B, d]``.

    Returns:
        One distance per state, shape ``[*B]``.

    Example:
        >>> import torch
        >>> l2_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist()
        [0.5]
    """
    return (action - data_action).square().mean(-1)


def q_scale(q: Tensor, alpha: float | Tensor, q_normalization: str | None = "mean_abs") -> Tensor:
    r"""The weight :math:`\lambda` of the Q term, detached from the graph.

    :math:`\lambda = \alpha / \mathrm{mean}\,|Q_1(s, \pi_i(s,z))|` with ``"mean_abs"`` (TD3+BC's
    normalisation; keeps the two terms of the objective on one scale whatever the rewards are), and
    :math:`\lambda = \alpha` with ``None`` (the original code, which diverges on small datasets).

    Args:
        q: :math:`Q_1(s, \pi_i(s, z))`, any shape.
        alpha: the trade-off, dimensionless.
        q_normalization: ``"mean_abs"`` or ``None``.

    Returns:
        A scalar tensor without gradient.

    Example:
        >>> import torch
        >>> q_scale(torch.tensor([-2.0, 6.0]), alpha=1.0).item()
        0.25
        >>> q_scale(torch.tensor([-2.0, 6.0]), alpha=1.0, q_normalization=None).item()
        1.0
    """
    if q_normalization is None:
        return q.new_ones(()) * alpha
    # The floor only matters while every Q is exactly 0, e.g. in a freshly zeroed network.
    return alpha / q.detach().abs().mean().clamp_min(1e-8)


def jko_loss(q: Tensor, distance: Tensor, *, scale: Tensor, weight: float | Tensor) -> Tensor:
    r"""One JKO step's objective per state: :math:`-\lambda\,Q_1(s, \pi_i(s,z)) + w_i\,D_i(s)`.

    Args:
        q: shape ``[*B]``.
        distance: :math:`D_i(s)`, shape ``[*B]``: :func:`l2_distance` for actor 0, the Sinkhorn
            divergence of :mod:`pogo_torchrl.ot` to the previous actor for the others.
        scale: :math:`\lambda`, see :func:`q_scale`.
        weight: :math:`w_i`, the actor's entry of ``w2_weights``.

    Returns:
        The loss per state, shape ``[*B]``.

    Example:
        >>> import torch
        >>> jko_loss(torch.tensor([4.0]), torch.tensor([2.0]), scale=torch.tensor(0.25), weight=0.5)
        tensor([0.])
    """
    return weight * distance - scale * q
