"""Ranking of the actors of a chain without an environment, by fitted Q evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives import SoftUpdate
from torchrl.trainers import TrainerHookBase

from pogo_torchrl import functional
from pogo_torchrl.modules import make_qvalue
from pogo_torchrl.objectives import FQELoss
from pogo_torchrl.objectives.settings import check_integer, plain_number
from pogo_torchrl.trainers.hooks import Sink

# 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

# With a fixed policy, targets may move faster than in training. The rate falls to 0 over a fit.
_LR, _TAU, _BATCH_SIZE = 1e-3, 0.3, 256


class OfflineValue(NamedTuple):
    """Value of one actor by fitted Q evaluation."""

    actor: int
    """Index of the actor in the chain."""
    value: float
    """Mean discounted return from the start states of the dataset."""
    low: float
    """Lower end of the 95 % interval of the value."""
    high: float
    """Upper end of the 95 % interval of the value."""
    rank: int
    """1 for the highest value; equal values share a rank."""


def episode_starts(rows: TensorDictBase) -> Tensor:
    """Return the mask of the first rows of the episodes of a dataset.

    Args:
        rows: transitions in the order in which they were collected, ``[rows]``. An episode ends
            with a terminal row, and where the next row does not start from where the row led.

    Returns:
        The mask, ``[rows]``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({
        ...     "observation": torch.tensor([[0.0], [1.0], [5.0], [6.0]]),
        ...     "next": {"observation": torch.tensor([[1.0], [2.0], [6.0], [7.0]]),
        ...              "terminated": torch.tensor([[False], [False], [True], [False]])}}, [4])
        >>> episode_starts(rows).tolist()
        [True, False, True, True]
    """
    first = torch.ones(len(rows), dtype=torch.bool, device=rows["observation"].device)
    first[1:] = (rows["next", "observation"][:-1] != rows["observation"][1:]).any(-1)
    first[1:] |= rows["next", "terminated"][:-1].squeeze(-1)
    return first


def rank_actors(
    actors: Sequence[TensorDictModule],
    rows: TensorDictBase,
    *,
    gamma: float = 0.99,
    updates: int = 3000,
    num_critics: int = 4,
    hidden_sizes: Sequence[int] = (128, 128),
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> list[OfflineValue]:
    r"""Rank policies by their values on a dataset, without an environment.

    The critics of :class:`~pogo_torchrl.objectives.FQELoss` are fitted for all actors at once. The
    value of actor i is the mean of :math:`Q_i(s_0, \pi_i(s_0))` over its critics and the start
    states of the dataset's episodes. Each critic is fitted to its own bootstrap sample of the
    episodes, and the 95 % interval follows from the spread of their values. The global random state
    is neither read nor changed.

    Args:
        actors: the policies, on the observations of ``rows``; they act without noise.
        rows: the dataset: transitions in the order of collection, such as
            ``make_replay_buffer(...)[:]``.

    Keyword Args:
        gamma: discount factor. Defaults to ``0.99``.
        updates: number of updates of the critics. Defaults to ``3000``.
        num_critics: number of critics per actor; with a single one, intervals show the spread of
            the start states only. Defaults to ``4``.
        hidden_sizes: widths of the hidden layers of the critics. Defaults to ``(128, 128)``.
        seed: seed of initialisation, batches and resampling. Defaults to ``0``.
        progress: called with the number of completed updates after each of them. Defaults to a
            no-op.

    Returns:
        One value per actor, in the order of ``actors``.

    Raises:
        ValueError: if a setting is out of range.
        FloatingPointError: if the values are not finite.

    Source: Le, Voloshin & Yue, *Batch Policy Learning under Constraints*, 2019, arXiv:1903.08738.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from pogo_torchrl import make_actor
        >>> spec = Bounded(low=-torch.ones(1), high=torch.ones(1))
        >>> rows = TensorDict({"observation": torch.randn(64, 2), "action": spec.rand([64]),
        ...     "next": {"observation": torch.randn(64, 2), "reward": torch.randn(64, 1),
        ...              "done": torch.ones(64, 1, dtype=torch.bool),
        ...              "terminated": torch.ones(64, 1, dtype=torch.bool)}}, [64])
        >>> values = rank_actors([make_actor(2, spec), make_actor(2, spec)], rows, updates=2)
        >>> sorted(value.rank for value in values)
        [1, 2]
    """
    check_integer("updates", updates)
    action = rows["action"]
    with torch.random.fork_rng([action.device] if action.is_cuda else []):
        torch.manual_seed(seed)
        starts = episode_starts(rows)
        critic = make_qvalue(
            rows["observation"].shape[-1], action.shape[-1], hidden_sizes, layer_norm=True
        )
        loss = FQELoss(actors, critic, num_qvalue_nets=num_critics).to(action)
        loss.make_value_estimator(gamma=gamma)
        reward, terminated = rows["next", "reward"], rows["next", "terminated"]
        centre, scale = functional.value_scale(reward, terminated, gamma)
        rows = rows.clone(False).select(*loss.in_keys)
        centred = functional.centred_reward(reward, terminated, gamma, centre)
        rows["next", "reward"] = centred / scale
        counts = _resampled(int(starts.sum()), num_critics, action)
        if num_critics > 1:
            rows["bootstrap_weight"] = counts[:, starts.cumsum(0) - 1].T.contiguous()
        _fit(loss, rows, updates, progress)
        values = centre + scale * loss.values(rows[starts])  # actor, critic, episode
    means = values.mean((1, 2))
    margin = _margin(values, counts)
    if not means.isfinite().all():
        raise FloatingPointError(
            f"fitted Q evaluation has diverged (values {means.tolist()}): use a smaller gamma."
        )
    ranks = 1 + (means > means.unsqueeze(-1)).sum(-1)
    columns = (x.tolist() for x in (means, means - margin, means + margin, ranks))
    return [OfflineValue(i, *row) for i, row in enumerate(zip(*columns))]


def _fit(
    loss: FQELoss, rows: TensorDictBase, updates: int, progress: Callable[[int], None]
) -> None:
    targets = SoftUpdate(loss, tau=_TAU)
    optimizer = torch.optim.Adam(loss.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for step in range(1, updates + 1):
        batch = rows[torch.randint(len(rows), (_BATCH_SIZE,), device=rows["action"].device)]
        loss(batch)["loss_qvalue"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        targets.step()
        progress(step)


def _resampled(size: int, samples: int, like: Tensor) -> Tensor:
    """How often bootstrap samples draw each of ``size`` elements, ``[samples, size]``."""
    drawn = torch.randint(size, (samples, size), device=like.device)
    return like.new_zeros(samples, size).scatter_add_(1, drawn, like.new_ones(samples, size))


def _margin(values: Tensor, counts: Tensor) -> Tensor:
    """Half the widths of the 95 % intervals of ``values``, ``[actors, critics, episodes]``.

    The values of the critics, each with its own sample of the episodes (``counts``), are bootstrap
    replicates: their standard deviation is the standard error of a value.
    """
    _, critics, episodes = values.shape
    if critics == 1:
        return 1.96 * values.flatten(1).std(1, correction=0) / episodes**0.5
    replicates = (values * counts).sum(-1) / episodes
    quantile = _T[critics - 2] if critics - 2 < len(_T) else 1.96 + 2.4 / (critics - 1)
    return quantile * replicates.std(1)


class RankActors(TrainerHookBase):
    """Trainer hook that ranks the actors by :func:`rank_actors` every ``interval`` updates.

    The averaged actors are ranked, if there are any. A ranking uses its own random state, so that
    it does not affect the training, but takes the time of its ``updates``.

    Args:
        sinks: destinations of the rows: ``actor``, ``mode``, ``value``, ``low``, ``high``,
            ``rank`` and ``seconds``. Defaults to none.

    Keyword Args:
        interval: number of updates between two rankings; there is also one at the end. Defaults to
            ``100_000``.
        report: called with each ranking, e.g. to print it. Defaults to a no-op.
        **settings: passed to :func:`rank_actors`. The discount factor is the loss's by default.

    Raises:
        ValueError: if ``interval`` is less than 1.

    Example:
        >>> RankActors(interval=50_000, updates=5000).interval
        50000
    """

    def __init__(
        self,
        sinks: Sequence[Sink] = (),
        *,
        interval: int = 100_000,
        report: Callable[[list[OfflineValue]], None] = lambda values: None,
        **settings: Any,
    ) -> None:
        check_integer("interval", interval)
        self.sinks, self.interval = sinks, plain_number(interval)
        self.report, self.settings = report, settings

    def register(self, trainer: Any, name: str = "rank_actors") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: unused, part of TorchRL's interface.
        """
        self.trainer = trainer
        trainer.add_interval(self.interval)
        trainer.register_op("post_steps", self._run)

    def _run(self) -> None:
        trainer, loss = self.trainer, self.trainer.loss_module
        step = trainer.collected_frames
        if trainer.stopping or not (step % self.interval == 0 or step >= trainer.total_frames):
            return
        started = time.perf_counter()
        actor = partial(loss.actor, averaged=True) if loss.average_actors else loss.actor
        settings = {"gamma": float(loss.value_estimator.gamma), **self.settings}
        actors = [actor(i) for i in range(loss.num_actors)]
        values = rank_actors(actors, trainer.dataset[:], **settings)
        rows = ranking_rows(values, time.perf_counter() - started)
        for sink in self.sinks:
            sink.write(step, rows)
        self.report(values)


def ranking_rows(values: Sequence[OfflineValue], seconds: float) -> list[dict[str, Any]]:
    """Rows of ``ranking.csv`` for one ranking.

    Args:
        values: the result of :func:`rank_actors`.
        seconds: the time that it took.
    """
    return [
        {
            "actor": v.actor,
            "mode": "deterministic",
            "value": v.value,
            "low": v.low,
            "high": v.high,
            "rank": v.rank,
            "seconds": seconds,
        }
        for v in values
    ]
