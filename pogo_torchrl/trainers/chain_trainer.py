"""The trainer of a JKO chain over any of TorchRL's losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrl.data import ReplayBuffer

from pogo_torchrl.objectives import JKOChain
from pogo_torchrl.objectives.chain_base import base_settings
from pogo_torchrl.trainers.chain_stepper import ChainOptimizationStepper
from pogo_torchrl.trainers.trainer import POGOTrainer

CRITICS_FIRST = (("qvalue",), ("actor",))
"""Order of updates of TD3 and its descendants: the actor follows the updated critics."""

TOGETHER = (("actor", "qvalue", "value"),)
"""Order of updates of IQL in TorchRL: all networks at the same parameters."""


class ChainTrainer(POGOTrainer):
    """The :class:`~pogo_torchrl.POGOTrainer` of a :class:`~pogo_torchrl.JKOChain`.

    It trains the base loss as TorchRL's own loops do, and after its actor those of the chain, each
    with an optimizer of its own (:class:`ChainOptimizationStepper`). Hooks, metrics, checkpoints,
    resuming and ``freeze_critics_at`` are those of :class:`~pogo_torchrl.POGOTrainer`. Updates run
    in eager mode and in float32.

    Args:
        chain: the chain; a chain without added actors trains the base alone.
        replay_buffer: replay buffer with a ``sample()`` method.
        total_steps: total number of updates.

    Keyword Args:
        order: groups of the base's networks that are updated together, in the order of their
            updates: :data:`CRITICS_FIRST`, or :data:`TOGETHER` for ``IQLLoss``. Defaults to
            :data:`CRITICS_FIRST`.
        **settings: the other arguments of :class:`~pogo_torchrl.POGOTrainer`; optimizers are
            functions from parameters to an optimizer; ``compile`` and ``bf16`` are refused.

    Raises:
        ValueError: for invalid settings.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl.modules import MLP
        >>> from torchrl.objectives import TD3BCLoss
        >>> from pogo_torchrl import JKOChain, make_qvalue
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> rb = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
        >>> _ = rb.extend(TensorDict({
        ...     "observation": torch.randn(64, 3), "action": spec.rand([64]),
        ...     ("next", "observation"): torch.randn(64, 3),
        ...     ("next", "reward"): torch.randn(64, 1),
        ...     ("next", "done"): torch.zeros(64, 1, dtype=torch.bool),
        ...     ("next", "terminated"): torch.zeros(64, 1, dtype=torch.bool)}, [64]))
        >>> net = MLP(in_features=3, out_features=2, num_cells=[8])
        >>> actor = TensorDictModule(net, ["observation"], ["action"])
        >>> base = TD3BCLoss(actor, make_qvalue(3, 2), action_spec=spec)
        >>> chain = JKOChain(base, step_sizes=[0.1, 0.1])
        >>> _ = chain.make_value_estimator(gamma=0.99)
        >>> trainer = ChainTrainer(chain, rb, total_steps=4, policy_freq=2, progress_bar=False)
        >>> trainer.train()
        >>> list(trainer.optimization_stepper.optimizers)
        ['qvalue', 'actor', 'chain_actor_1', 'chain_actor_2']
    """

    def __init__(
        self,
        chain: JKOChain,
        replay_buffer: ReplayBuffer,
        total_steps: int,
        *,
        order: Sequence[Sequence[str]] = CRITICS_FIRST,
        **settings: Any,
    ) -> None:
        self.order = order
        super().__init__(chain, replay_buffer, total_steps, **settings)

    def make_stepper(
        self, loss_module: JKOChain, *, compile: bool = False, bf16: bool = False, **settings: Any
    ) -> ChainOptimizationStepper:
        """Create the optimization stepper.

        Raises:
            ValueError: for settings that a chain over another loss does not support.
        """
        for name, value in {"compile": compile, "bf16": bf16}.items():
            if value:
                raise ValueError(
                    f"{name}={value} needs POGOLoss: a chain over another loss is trained in eager "
                    f"mode and in float32. Use {name}=False, or torch.compile in your own loop."
                )
        return ChainOptimizationStepper(loss_module, order=self.order, **settings)

    def loss_settings(self) -> dict[str, Any]:
        """Return the settings of the chain, and the class and the settings of its base."""
        chain = self.loss_module
        names = ("w2_weights", "actor_q", "distance", "num_samples", "blur", "w2_backend",
                 "q_normalization", "alpha", "entropy_weight")  # fmt: skip
        found = {name: getattr(chain, name) for name in names}
        base = {f"base.{name}": value for name, value in base_settings(chain.base_loss).items()}
        return {**found, **base, "base": type(chain.base_loss).__name__, "order": self.order}
