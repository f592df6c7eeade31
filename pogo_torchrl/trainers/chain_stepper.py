"""The optimization stepper of a chain over another loss: TorchRL's losses, term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.objectives import SoftUpdate
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl.objectives import JKOChain
from pogo_torchrl.torchrl_private import count_updates, run_stage
from pogo_torchrl.trainers.optimizers import MakeOptimizer, MakeScheduler, adam, step_schedulers
from pogo_torchrl.trainers.stepper import Batches


class ScalarMeans:
    """Running means of scalars by name, each over the updates since its first value."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Add the scalars of one update."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    @property
    def count(self) -> int:
        """Number of updates since the last reset."""
        return max(self.counts.values(), default=0)

    def tensors(self) -> TensorDict:
        """Return the means by name, without waiting for the device."""
        return TensorDict({name: value / self.counts[name] for name, value in self.sums.items()})

    def __call__(self) -> dict[str, float]:
        """Return the means by name; empty before the first update. Waits for the device."""
        return dict(sorted((name, float(value)) for name, value in self.tensors().items()))

    def reset(self) -> None:
        """Reset the sums and the counts."""
        self.sums, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the counts."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        self.sums, self.counts = dict(state_dict["sums"]), dict(state_dict["counts"])


class ChainOptimizationStepper(OptimizationStepper):
    """Optimization stepper of a :class:`~pogo_torchrl.JKOChain`: trains the base, then the chain.

    The networks of the base are updated in groups: the losses of a group (``actor_loss``,
    ``qvalue_loss``, ``value_loss``) are computed at the same parameters, summed, and followed by a
    step of each network's optimizer. The group with the actor, the added actors, in the order of
    the chain, and the targets are updated at every ``policy_freq``-th update.

    Args:
        chain: the chain, which holds the base loss.

    Keyword Args:
        order: groups of the base's networks, in the order of their updates, such as
            ``(("qvalue",), ("actor",))``.
        lr: learning rate of the default optimizers. Defaults to ``3e-4``.
        qvalue_optimizer: function from the parameters of a critic or value network to its
            optimizer. Defaults to Adam.
        actor_optimizer: the same for each actor. Defaults to Adam.
        qvalue_lr_scheduler: function from the optimizer of a critic or value network to its
            scheduler, which is stepped after each update. Defaults to ``None``.
        actor_lr_scheduler: the same for each actor. Defaults to ``None``.
        clip_grad_norm: maximum gradient norm, applied separately to each network. Defaults to
            ``None``: no clipping.
        policy_freq: number of critic updates per update of the actors. Defaults to ``1``.
        tau: Polyak step of the targets. Defaults to ``None``: the stepper does not update them.

    Attributes:
        freeze_at: number of updates after which the base is frozen, and until which the chain is
            not trained; set by :class:`~pogo_torchrl.trainers.freeze.FreezeThenFlow`.
    """

    bf16 = False

    def __init__(
        self,
        chain: JKOChain,
        *,
        order: Sequence[Sequence[str]],
        lr: float = 3e-4,
        qvalue_optimizer: MakeOptimizer | None = None,
        actor_optimizer: MakeOptimizer | None = None,
        qvalue_lr_scheduler: MakeScheduler | None = None,
        actor_lr_scheduler: MakeScheduler | None = None,
        clip_grad_norm: float | None = None,
        policy_freq: int = 1,
        tau: float | None = None,
    ) -> None:
        self.chain, self.order = chain, [list(group) for group in order]
        self.clip_grad_norm, self.policy_freq, self.tau = clip_grad_norm, policy_freq, tau
        default = adam(lr, device=chain.action_low.device)
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name in (name for group in self.order for name in group):
            self.parameters[name] = _trainable(getattr(chain.base_loss, f"{name}_network_params"))
        self._chain_names = [f"chain_actor_{i}" for i in range(1, chain.num_actors)]
        for i, name in enumerate(self._chain_names, 1):
            self.parameters[name] = chain.actor_params(i)
        self.optimizers: dict[str, Optimizer] = {}
        self.schedulers: dict[str, LRScheduler] = {}
        for name, parameters in self.parameters.items():
            is_actor = "actor" in name
            make = actor_optimizer if is_actor else qvalue_optimizer
            schedule = actor_lr_scheduler if is_actor else qvalue_lr_scheduler
            self.optimizers[name] = (default if make is None else make)(parameters)
            if schedule is not None:
                self.schedulers[name] = schedule(self.optimizers[name])
        self._targets = None if tau is None else SoftUpdate(chain, tau=tau)
        self.steps = 0
        self.freeze_at: int | None = None
        self._means: list[ScalarMeans] = []
        self._scalars: dict[str, Tensor] = {}
        self.last_batch: TensorDictBase | None = None

    @property
    def names(self) -> list[str]:
        """Names of the losses, of those among the scalars that are always there."""
        return [f"loss_{name}" for group in self.order for name in group]

    # ------------------------------------------------------------------ updates

    def step(self, trainer: Any, sub_batch: TensorDictBase) -> TensorDictBase:
        """Run one update, or many; see :class:`POGOOptimizationStepper`.

        Args:
            trainer: trainer whose loop calls this method.
            sub_batch: a batch of transitions, or a tensordict without entries that stands for
                ``sub_batch.numel()`` updates on batches of ``trainer.dataset``.

        Returns:
            The detached scalars of all losses, or their means over the updates.
        """
        if sub_batch.is_empty():
            count_updates(trainer, sub_batch.numel() - 1)
            return self.run(sub_batch.numel(), trainer.dataset)
        self.update(sub_batch)
        if isinstance(trainer, Trainer):  # its loop leaves this stage to the stepper
            run_stage(trainer, "post_loss", sub_batch)
        return self.metrics

    def run(self, count: int, batches: Batches) -> TensorDictBase:
        """Run ``count`` updates, sampling a batch for each; returns the means of their scalars."""
        means = ScalarMeans()
        for _ in range(count):
            self.update(batches.sample())
            means.add(self._scalars)
        return means.tensors()

    def update(self, batch: TensorDictBase) -> None:
        """Run one update on a batch of transitions ``[*B]``."""
        scalars: dict[str, Tensor] = {}
        with_actors = self.frozen or (self.steps + 1) % self.policy_freq == 0
        if not self.frozen:
            for group in self.order:
                if with_actors or "actor" not in group:
                    scalars |= self._update_base(group, batch)
        if with_actors and (self.frozen or self.freeze_at is None):
            for i, name in enumerate(self._chain_names, 1):
                loss, metadata = self.chain.actor_loss(batch, i)
                self._minimise(loss, [name])
                scalars |= metadata
        if with_actors and not self.frozen and self._targets is not None:
            self._targets.step()
        self.steps += 1
        step_schedulers(self.schedulers.values())
        self.last_batch = batch
        self._scalars |= scalars  # networks that are not trained repeat their last values
        for mean in self._means:
            mean.add(self._scalars)

    def _update_base(self, group: Sequence[str], batch: TensorDictBase) -> dict[str, Tensor]:
        """Update networks of the base from losses at the same parameters."""
        base, scalars, losses = self.chain.base_loss, {}, []
        for name in group:
            loss, metadata = getattr(base, f"{name}_loss")(batch)
            losses.append(loss)
            scalars[f"loss_{name}"] = loss.detach()
            error = metadata.pop("td_error", None)
            if error is not None:
                batch.set(base.tensor_keys.priority, error.detach().max(0)[0])
            scalars |= {key: value.detach().float().mean() for key, value in metadata.items()}
        self._minimise(sum(losses[1:], losses[0]), group)
        return scalars

    def _minimise(self, loss: Tensor, names: Sequence[str]) -> None:
        for name in names:
            self.optimizers[name].zero_grad()
        loss.backward()
        for name in names:
            if self.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters[name], self.clip_grad_norm)
            self.optimizers[name].step()

    @property
    def frozen(self) -> bool:
        """Whether the base is frozen in the next update."""
        return self.freeze_at is not None and self.steps >= self.freeze_at

    # ------------------------------------------------------------------ metrics and state

    def track(self) -> ScalarMeans:
        """Create running means of the scalars, which a hook may read and reset."""
        self._means.append(ScalarMeans())
        return self._means[-1]

    @property
    def metrics(self) -> TensorDict:
        """The scalars of the last update, by name."""
        return TensorDict(self._scalars)

    def synchronize(self) -> None:
        """Nothing to do: the optimizers hold their step counts."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizers, schedulers, counters and means, not of the loss."""
        return {
            "steps": self.steps,
            "scalars": dict(self._scalars),
            "means": [mean.state_dict() for mean in self._means],
            "optimizers": {name: one.state_dict() for name, one in self.optimizers.items()},
            "schedulers": {name: one.state_dict() for name, one in self.schedulers.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        self.steps, self._scalars = state_dict["steps"], dict(state_dict["scalars"])
        for mean, state in zip(self._means, state_dict["means"]):
            mean.load_state_dict(state)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state_dict["schedulers"][name])


def _trainable(parameters: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in parameters.parameters() if parameter.requires_grad]
