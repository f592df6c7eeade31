"""Polyak averages of the actors, as target networks that TorchRL's updaters can move."""

from __future__ import annotations

import warnings

from torchrl.objectives.common import LossModule

from pogo_torchrl.objectives.chain_loss import ChainLoss


class ActorAverages(LossModule):
    r"""The averaged actors of a loss, presented to ``SoftUpdate`` as targets of its actors.

    .. math::
        \bar\theta_i \leftarrow (1 - \tau)\, \bar\theta_i + \tau\, \theta_i

    The averages are buffers of the loss (``average_actor_network_0_params``, ...), so that moving,
    saving and loading the loss includes them; this module holds no tensors of its own. Averaged
    weights score more steadily than those of a single update. They are evaluated and deployed, but
    do not act in any loss. :class:`~pogo_torchrl.POGOTrainer` updates them with the rate
    ``loss.average_actors`` as part of its update; your own loop does so with ``SoftUpdate``.

    Source: Polyak & Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992.

    Args:
        loss: a loss with ``average_actors``.

    Raises:
        ValueError: if the loss has no averages.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
        >>> from pogo_torchrl.objectives import ActorAverages
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), average_actors=0.002)
        >>> averages = SoftUpdate(ActorAverages(loss), tau=loss.average_actors)
        >>> averages.step()  # after each update of the actors
        >>> policy = loss.actor(-1, averaged=True)
    """

    def __init__(self, loss: ChainLoss) -> None:
        loss.check_averages()
        super().__init__()
        for i in range(loss.num_actors):
            name = f"actor_network_{i}"
            with warnings.catch_warnings():
                # TorchRL expects class annotations, but the number of actors is only known here.
                warnings.filterwarnings("ignore", ".*part of the annotations")
                self.convert_to_functional(loss.actor(i), name, create_target_params=True)
            # The tensors of the loss replace the copies just made.
            setattr(self, f"{name}_params", getattr(loss, f"{name}_params"))
            setattr(self, f"target_{name}_params", getattr(loss, f"average_{name}_params"))
