"""The equations of POGO as pure functions of tensors, one equation per function.

The functions are independent of tensordicts, networks and devices. Leading dimensions ``*B`` are
arbitrary; the last dimension is the action dimension ``d``. Sources: *Policy Optimization as a
Gradient Flow in Offline Reinforcement Learning* (POGO); for the target of the critics, Fujimoto et
al., *Addressing Function Approximation Error in Actor-Critic Methods*, 2018, arXiv:1802.09477.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Q_NORMALIZATIONS = ("mean_abs", None)
"""Accepted values of ``q_normalization``, see :func:`q_scale`."""


def smoothed_target_action(
    action: Tensor, noise: Tensor, low: Tensor, high: Tensor, *, sigma: float, clip: float
) -> Tensor:
    r"""Target-policy smoothing of TD3, with the noise in units of half the action range.

    .. math::
        a' = \mathrm{clip}\big(\pi_0(s', z') +
             \tfrac{high - low}{2}\,\mathrm{clip}(\sigma n, -c, c),\; low,\; high\big)

    Source: Fujimoto et al., *Addressing Function Approximation Error in Actor-Critic Methods*,
    2018, arXiv:1802.09477, section 5.3.

    Args:
        action: :math:`\pi_0(s', z')`, of shape ``[*B, d]``.
        noise: standard normal draws :math:`n`, of shape ``[*B, d]``.
        low: lower action bound, broadcastable to ``[d]``.
        high: upper action bound, broadcastable to ``[d]``.
        sigma: standard deviation of the noise, in units of half the action range.
        clip: :math:`c`, the maximal magnitude of the noise, in the same units.

    Returns:
        The smoothed action within the bounds, of shape ``[*B, d]``.

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

    A time-out is not a terminal state and must not be marked in ``terminated``. This function is a
    reference: :class:`~pogo_torchrl.POGOLoss` uses TorchRL's value estimators, whose default TD(0)
    gives the same target.

    Args:
        reward: rewards, of shape ``[*B]``.
        terminated: boolean terminal flags, of shape ``[*B]``.
        next_value: minimum of the target critics, of shape ``[*B]``.
        gamma: discount factor per step.

    Returns:
        The targets, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> end = torch.tensor([False, True])
        >>> td_target(torch.ones(2), end, torch.full((2,), 10.0), gamma=0.5).tolist()
        [6.0, 1.0]
    """
    return reward + gamma * (~terminated).to(next_value.dtype) * next_value


def to_unit_box(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map actions linearly from their bounds to [-1, 1] (the identity for D4RL's tasks).

    Distances between policies are computed on mapped actions, so that ``w2_weights`` and ``blur``
    have the same meaning for every action space.

    Args:
        action: actions, of shape ``[*B, d]``.
        low: lower action bound, broadcastable to ``[d]``.
        high: upper action bound, broadcastable to ``[d]``.

    Returns:
        The mapped actions, of shape ``[*B, d]``.

    Example:
        >>> import torch
        >>> low, high = torch.tensor(0.0), torch.tensor(4.0)
        >>> to_unit_box(torch.tensor([0.0, 2.0, 4.0]), low, high).tolist()
        [-1.0, 0.0, 1.0]
    """
    return (2 * action - (high + low)) / (high - low)


def l2_distance(action: Tensor, data_action: Tensor) -> Tensor:
    r"""Distance of actor 0 to the data: :math:`D_0(s) = \frac1d \sum_k (\pi_0(s,z) - a)_k^2`.

    The Wasserstein-2 distance to a point mass is the L2 distance. The published ``w2_weights`` are
    tuned to the mean, not the sum, over the action dimensions.

    Args:
        action: :math:`\pi_0(s, z)` mapped to [-1, 1], of shape ``[*B, d]``.
        data_action: the action of the dataset mapped to [-1, 1], of shape ``[*B, d]``.

    Returns:
        One distance per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> l2_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist()
        [0.5]
    """
    return (action - data_action).square().mean(-1)


def advantage_weights(
    q_data: Tensor, q_policy: Tensor, temperature: float, clip: float = 10.0
) -> Tensor:
    r"""Weights of the states in an advantage-weighted :math:`D_0`, detached from the graph.

    .. math::
        w(s) = \frac{\min(e^{A(s)/\beta}, c)}{\mathrm{mean}\, \min(e^{A/\beta}, c)}, \qquad
        A(s) = \frac{Q(s, a) - Q(s, \pi_0(s, z))}{\mathrm{mean}\, |Q(s, \pi_0(s, z))|}

    The unweighted distance pulls an actor towards the mean of all actions in a mixture of good and
    bad behaviour. Here, actions of the dataset that are better than the policy's count for more.
    The advantage is relative to the magnitude of Q, so that :math:`\beta` does not depend on the
    scale of the rewards, and the mean weight is 1, so that :math:`w_0` keeps its meaning.

    Source: Peng et al., *Advantage-Weighted Regression: Simple and Scalable Off-Policy
    Reinforcement Learning*, 2019, arXiv:1910.00177; with clipped weights in Kostrikov et al.,
    *Offline Reinforcement Learning with Implicit Q-Learning*, 2021, arXiv:2110.06169.

    Args:
        q_data: :math:`Q(s, a)` at the actions of the dataset, of shape ``[*B]``.
        q_policy: :math:`Q(s, \pi_0(s, z))`, of shape ``[*B]``.
        temperature: :math:`\beta > 0`; the smaller, the more the weights differ.
        clip: c, the largest weight before the division by the mean. Defaults to ``10``.

    Returns:
        The weights without gradient, of shape ``[*B]``, with mean 1.

    Example:
        >>> import torch
        >>> advantage_weights(torch.tensor([1.0, 1 + math.log(3)]), torch.ones(2), temperature=1.0)
        tensor([0.5000, 1.5000])
    """
    q_data, q_policy = q_data.detach(), q_policy.detach()
    # The floor only matters if every Q value is 0, as in q_scale().
    advantage = (q_data - q_policy) / q_policy.abs().mean().clamp_min(1e-8)
    exponents = (advantage / temperature).clamp_max(math.log(clip))
    # softmax() neither overflows nor divides by zero.
    return exponents.numel() * exponents.flatten().softmax(0).view_as(exponents)


def squared_distance(action: Tensor, other: Tensor) -> Tensor:
    r"""Squared distance between actions, :math:`|a - b|^2 = \sum_k (a_k - b_k)^2`.

    It is ReBRAC's penalty in the loss of the actor.

    Source: Tarasov et al., *Revisiting the Minimalist Approach to Offline Reinforcement Learning*
    (ReBRAC), 2023, arXiv:2305.09836.

    Args:
        action: actions mapped to [-1, 1], of shape ``[*B, d]``.
        other: other actions mapped to [-1, 1], of shape ``[*B, d]``.

    Returns:
        One distance per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> squared_distance(torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, 1.0]])).tolist()
        [1.25]
    """
    return (action - other).square().sum(-1)


def next_action_penalty(action: Tensor, data_action: Tensor) -> Tensor:
    r"""Penalty on the next action in the TD target: :math:`\sum_k (a' - a'_{data})_k^2`.

    It is 0 where the dataset holds no next action, which is marked by NaN.

    Source: Tarasov et al., *Revisiting the Minimalist Approach to Offline Reinforcement Learning*
    (ReBRAC), 2023, arXiv:2305.09836.

    Args:
        action: :math:`a'`, the target's action mapped to [-1, 1], of shape ``[*B, d]``.
        data_action: the dataset's action in the next state mapped to [-1, 1], or NaN, of shape
            ``[*B, d]``.

    Returns:
        One penalty per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> data_action = torch.tensor([[0.0, 1.0], [torch.nan, torch.nan]])
        >>> next_action_penalty(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), data_action).tolist()
        [0.5, 0.0]
    """
    unknown = data_action.isnan().any(-1)
    return squared_distance(action, data_action).masked_fill(unknown, 0.0)


def q_scale(
    q: Tensor, alpha: float | Tensor, q_normalization: Literal["mean_abs"] | None = "mean_abs"
) -> Tensor:
    r"""Weight :math:`\lambda` of the Q term, detached from the graph.

    With ``"mean_abs"``, :math:`\lambda = \alpha / \mathrm{mean}\,|Q_1(s, \pi_i(s,z))|`, the
    normalisation of TD3+BC, which makes the trade-off independent of the scale of the rewards. With
    ``None``, :math:`\lambda = \alpha`, as in the original code, which diverges on small datasets.

    Source: Fujimoto & Gu, *A Minimalist Approach to Offline Reinforcement Learning*, 2021,
    arXiv:2106.06860.

    Args:
        q: :math:`Q_1(s, \pi_i(s, z))`, of any shape.
        alpha: weight of the Q term, dimensionless.
        q_normalization: ``"mean_abs"`` or ``None``. Defaults to ``"mean_abs"``.

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
    # The floor only matters if every Q value is 0, e.g. for a network with zero weights.
    return alpha / q.detach().abs().mean().clamp_min(1e-8)


def jko_loss(q: Tensor, distance: Tensor, *, scale: Tensor, weight: float | Tensor) -> Tensor:
    r"""Objective of a JKO step per state: :math:`-\lambda\,Q_1(s, \pi_i(s,z)) + w_i\,D_i(s)`.

    Args:
        q: :math:`Q_1(s, \pi_i(s, z))`, of shape ``[*B]``.
        distance: :math:`D_i(s)`, of shape ``[*B]``: :func:`l2_distance` for actor 0, and the
            :func:`~pogo_torchrl.sinkhorn_divergence` to the previous actor for later actors.
        scale: :math:`\lambda`, see :func:`q_scale`.
        weight: :math:`w_i`, the actor's entry of ``w2_weights``.

    Returns:
        The loss per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> jko_loss(torch.tensor([4.0]), torch.tensor([2.0]), scale=torch.tensor(0.25), weight=0.5)
        tensor([0.])
    """
    return weight * distance - scale * q


def gaussian_w2(loc: Tensor, scale: Tensor, other_loc: Tensor, other_scale: Tensor) -> Tensor:
    r"""Half the squared 2-Wasserstein distance between diagonal Gaussians.

    .. math::
        \tfrac12 W_2^2 = \tfrac12 \sum_k (\mu_k - \mu'_k)^2 + (\sigma_k - \sigma'_k)^2

    The factor is that of the Sinkhorn divergence, so that weights can be kept.

    Source: Olkin & Pukelsheim, *The distance between two random vectors with given dispersion
    matrices*, 1982, for covariances that commute.

    Args:
        loc: means :math:`\mu`, of shape ``[*B, d]``.
        scale: standard deviations :math:`\sigma`, of shape ``[*B, d]``.
        other_loc: means :math:`\mu'`.
        other_scale: standard deviations :math:`\sigma'`.

    Returns:
        The distance per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2)
        >>> gaussian_w2(0 * one, one, 2 * one, 3 * one)
        tensor([8.])
    """
    return ((loc - other_loc).square() + (scale - other_scale).square()).sum(-1) / 2


def gaussian_kl(loc: Tensor, scale: Tensor, other_loc: Tensor, other_scale: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence between diagonal Gaussians.

    .. math::
        \mathrm{KL}(N(\mu, \sigma^2) \,\|\, N(\mu', \sigma'^2)) = \sum_k
        \log \frac{\sigma'_k}{\sigma_k}
        + \frac{\sigma_k^2 + (\mu_k - \mu'_k)^2}{2 \sigma_k'^2} - \frac12

    For equal standard deviations, it is :func:`gaussian_w2` divided by :math:`\sigma^2`: half the
    squared displacement in units of the standard deviation. It is the same before and after an
    invertible map of both Gaussians, such as a tanh.

    Source: Kullback & Leibler, *On Information and Sufficiency*, 1951; the closed form is e.g. in
    Kingma & Welling, *Auto-Encoding Variational Bayes*, 2013, arXiv:1312.6114, appendix B.

    Args:
        loc: means :math:`\mu`, of shape ``[*B, d]``.
        scale: standard deviations :math:`\sigma`, of shape ``[*B, d]``.
        other_loc: means :math:`\mu'` of the reference.
        other_scale: standard deviations :math:`\sigma'` of the reference.

    Returns:
        The divergence per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2)
        >>> gaussian_kl(0 * one, 0.5 * one, one, 0.5 * one)
        tensor([4.])
    """
    variance = 2 * other_scale.square()
    moved = (scale.square() + (loc - other_loc).square()) / variance
    return ((other_scale / scale).log() + moved - 0.5).sum(-1)


def fisher_rao(loc: Tensor, scale: Tensor, other_loc: Tensor, other_scale: Tensor) -> Tensor:
    r"""Half the squared Fisher-Rao distance between diagonal Gaussians.

    .. math::
        \tfrac12 d_F^2 = \sum_k \mathrm{arcosh}^2 \Big(1 +
        \frac{(\mu_k - \mu'_k)^2 / 2 + (\sigma_k - \sigma'_k)^2}{2 \sigma_k \sigma'_k}\Big)

    Normal distributions of one dimension are a hyperbolic half-plane under the Fisher information
    :math:`(d\mu^2 + 2 d\sigma^2) / \sigma^2`, with geodesic distance :math:`\sqrt 2` times the
    arcosh, and diagonal Gaussians are their product. Close Gaussians are as far apart as in
    :func:`gaussian_kl`, to second order. The distance is symmetric, and the same before and after
    an invertible map of both Gaussians.

    Source: Costa, Santos & Strapasson, *Fisher information distance: a geometrical reading*, 2015,
    arXiv:1210.2354, sections 2 and 3.

    Args:
        loc: means :math:`\mu`, of shape ``[*B, d]``.
        scale: standard deviations :math:`\sigma`, of shape ``[*B, d]``.
        other_loc: means :math:`\mu'`.
        other_scale: standard deviations :math:`\sigma'`.

    Returns:
        The distance per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> fisher_rao(one, one, one, math.e * one)
        tensor([1.0000])
    """
    gap = (loc - other_loc).square() / 2 + (scale - other_scale).square()
    # arcosh(1 + x) = 2 arsinh(sqrt(x / 2)). The root has no slope at 0, where that of the distance
    # is 0, as that of a clamped argument.
    root = (gap / (4 * scale * other_scale)).clamp_min(1e-12).sqrt()
    return (2 * root.asinh()).square().sum(-1)


def gaussian_entropy(scale: Tensor) -> Tensor:
    r"""Entropy of a diagonal Gaussian, :math:`\sum_k \tfrac12 \log(2 \pi e\, \sigma_k^2)`.

    Args:
        scale: standard deviations :math:`\sigma`, of shape ``[*B, d]``.

    Returns:
        The entropy per state, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> gaussian_entropy(torch.ones(1, 2))
        tensor([2.8379])
    """
    return (scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def step_sizes_to_weights(
    step_sizes: Sequence[float], action_dim: int, alpha: float = 1.0
) -> tuple[float, ...]:
    r"""Weights :math:`w_i` of a chain whose proximal steps have the sizes :math:`h_i`.

    For normalised Q, and with the mean squared displacement per action dimension as the unit,

    .. math::
        h_0 = \frac{\alpha}{2 w_0}, \qquad h_i = \frac{\alpha}{w_i d}, \quad i \ge 1,

    since :math:`D_0` is a mean over the d dimensions and :math:`D_i` half a sum: where Q is linear
    in the actions, the minimiser of :math:`L_i` is displaced from its reference by
    :math:`h_i\, d\, (\lambda / \alpha) \nabla_a Q`. Equal steps have :math:`w_i = 2 w_0 / d`.

    Args:
        step_sizes: :math:`h_i > 0`, one per actor.
        action_dim: d, number of action dimensions.
        alpha: weight of the Q term. Defaults to ``1.0``.

    Returns:
        The weights, one per actor.

    Example:
        >>> step_sizes_to_weights([0.5, 0.5], action_dim=4)
        (1.0, 0.5)
    """
    first, *others = step_sizes
    return alpha / (2 * first), *(alpha / (h * action_dim) for h in others)


def weights_to_step_sizes(
    w2_weights: Sequence[float], action_dim: int, alpha: float = 1.0
) -> tuple[float, ...]:
    r"""Step sizes :math:`h_i` of a chain, the inverse of :func:`step_sizes_to_weights`.

    Args:
        w2_weights: :math:`w_i \ge 0`, one per actor; a weight of 0 is a step of infinite size.
        action_dim: d, number of action dimensions.
        alpha: weight of the Q term. Defaults to ``1.0``.

    Returns:
        The step sizes, one per actor.

    Example:
        >>> weights_to_step_sizes([0.1, 0.5, 0.5], action_dim=3, alpha=0.03)
        (0.15, 0.02, 0.02)
    """
    first, *others = w2_weights
    costs = [2 * first, *(w * action_dim for w in others)]
    return tuple(alpha / cost if cost else math.inf for cost in costs)


def value_scale(reward: Tensor, terminated: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    r"""Centre and scale of the values of a dataset, to start a fit of Q functions from.

    The centre c is the constant that solves Bellman's equation on average over the dataset, the
    scale is the standard deviation of a sum of independent, discounted residuals of it:

    .. math::
        c = \frac{\sum r}{\sum (1 - \gamma (1 - terminated))}, \qquad
        \sigma^2 = \frac{\mathrm{var}(\tilde r)}{1 - \mathrm{mean}\,\gamma^2 (1 - terminated)}

    with :math:`\tilde r` of :func:`centred_reward`.

    Args:
        reward: rewards, of shape ``[*B]``.
        terminated: boolean terminal flags, of shape ``[*B]``.
        gamma: discount factor per step.

    Returns:
        The centre and the scale, scalars. The centre is 0 where no constant solves the equation,
        the scale 1 where all residuals are equal.

    Example:
        >>> import torch
        >>> centre, _ = value_scale(torch.ones(3), torch.zeros(3, dtype=torch.bool), gamma=0.5)
        >>> centre.item()
        2.0
    """
    discount = gamma * (~terminated).to(reward.dtype)
    ends = (1 - discount).sum()
    centre = reward.sum() / ends if ends > 0 else reward.new_zeros(())
    residual = centred_reward(reward, terminated, gamma, centre)
    scale = residual.std() / (1 - (discount**2).mean()).clamp_min(1e-4).sqrt()
    return centre, scale if scale > 0 else reward.new_ones(())


def centred_reward(
    reward: Tensor, terminated: Tensor, gamma: float, centre: float | Tensor
) -> Tensor:
    r"""Rewards whose Q functions are those of the given rewards minus a constant c, exactly.

    .. math::
        \tilde r = r - c\,(1 - \gamma (1 - terminated)), \qquad \tilde Q^\pi = Q^\pi - c

    Args:
        reward: rewards, of shape ``[*B]``.
        terminated: boolean terminal flags, of shape ``[*B]``.
        gamma: discount factor per step.
        centre: c.

    Returns:
        The rewards :math:`\tilde r`, of shape ``[*B]``.

    Example:
        >>> import torch
        >>> centred_reward(torch.ones(2), torch.tensor([False, True]), 0.5, 2.0).tolist()
        [0.0, -1.0]
    """
    return reward - centre * (1 - gamma * (~terminated).to(reward.dtype))
