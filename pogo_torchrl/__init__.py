"""POGO (policy optimization as a gradient flow in offline RL) as a TorchRL plugin.

Names are imported when first used: a trained chain is loaded without the training stack, and the
command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pogo_torchrl.imports import import_mujoco, provide_compile_cache

if TYPE_CHECKING:
    from pogo_torchrl.actors import TransportActor
    from pogo_torchrl.export import load_actors
    from pogo_torchrl.modules import make_actor, make_gaussian_actor, make_qvalue
    from pogo_torchrl.objectives import GaussianPOGOLoss, JKOChain, POGOLoss, ReBRACLoss
    from pogo_torchrl.ot import sinkhorn_divergence
    from pogo_torchrl.trainers import POGOTrainer

provide_compile_cache()  # before torch is imported
import_mujoco()  # before TorchRL does

__all__ = [
    "GaussianPOGOLoss",
    "JKOChain",
    "POGOLoss",
    "POGOTrainer",
    "ReBRACLoss",
    "TransportActor",
    "load_actors",
    "make_actor",
    "make_gaussian_actor",
    "make_qvalue",
    "sinkhorn_divergence",
]

_MODULES = {
    "GaussianPOGOLoss": "objectives",
    "JKOChain": "objectives",
    "POGOLoss": "objectives",
    "POGOTrainer": "trainers",
    "ReBRACLoss": "objectives",
    "TransportActor": "actors",
    "load_actors": "export",
    "make_actor": "modules",
    "make_gaussian_actor": "modules",
    "make_qvalue": "modules",
    "sinkhorn_divergence": "ot",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name in {"export", "functional", *_MODULES.values()}:  # pogo_torchrl.ot without an import
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
