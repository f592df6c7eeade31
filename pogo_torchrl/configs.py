"""Configuration: the options of a run, and POGO in TorchRL's own Hydra config groups.

Importing this module registers ``loss: pogo`` and ``trainer: pogo`` beside TorchRL's groups, and
the schema that ``conf/config.yaml`` is checked against.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from hydra.core.config_store import ConfigStore
from torchrl.trainers.algorithms.configs.objectives import LossConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DataConfig:
    """Where the transitions come from."""

    source: str = _option(
        "local",
        "local (rolled out here from bundled policies), d4rl (downloaded), minari or hdf5 (a file "
        "in D4RL's layout)",
    )
    path: str | None = _option(None, "the file, with hdf5; the dataset's id, with minari")
    mirror: str | None = _option(
        None, "address or folder of a copy of D4RL's files, with d4rl; null: D4RL's own server"
    )
    size: int = _option(100_000, "transitions to roll out, with data.source=local")
    seed: int = _option(0, "seed of these rollouts; the training's seed leaves the data alone")
    cache_dir: str | None = _option(
        None, "folder of rollouts and downloads; null: pogo_torchrl in your cache folder (~/.cache)"
    )
    normalize: bool = _option(True, "normalise observations by the data's mean and std")
    reward_shift: float = _option(0.0, "added to every reward (presets: -1 for antmaze)")


@dataclass
class EnvConfig:
    """Where policies are evaluated."""

    backend: str = _option(
        "mujoco", "mujoco (D4RL's physics on the installed MuJoCo) or d4rl (D4RL's own, an extra)"
    )
    id: str | None = _option(None, "another Gymnasium environment; null: the task's own")
    max_episode_steps: int | None = _option(None, "horizon of an episode; null: the task's own")


@dataclass
class LoggerConfig:
    """Where numbers go beside the CSV files."""

    backend: str | None = _option(None, "tensorboard or wandb, beside the CSV files; null: none")


@dataclass
class RunConfig:
    """Every option of ``examples/pogo_offline.py``; ``--help`` prints them."""

    task: str = _option("hopper-medium-v2", "D4RL task; its preset sets w2_weights and lr")
    seed: int = _option(0, "seed of initialisation, sampling, noise and evaluation")
    w2_weights: list[float] = _option([0.2, 0.2, 0.2], "w_i, one for each actor of the chain")
    total_steps: int = _option(2000, "updates; the papers use 1000000")
    eval_interval: int = _option(500, "updates between evaluations; one always ends the run")
    eval_episodes: int = _option(10, "episodes per actor and action mode of an evaluation")
    log_interval: int = _option(250, "updates between rows of metrics.csv")
    checkpoint_interval: int = _option(1000, "updates between checkpoints; one always ends the run")
    resume: bool = _option(False, "go on from the newest checkpoint of the same run")
    device: str = _option("auto", "auto (a GPU where there is one), cpu or cuda")
    compile: str = _option("auto", "torch.compile of the losses: auto (= false), true or false")
    deterministic: bool = _option(
        False, "bit-identical repetition on a GPU, slower; a CPU always repeats"
    )
    log_dir: str = _option("logs", "runs are written to LOG_DIR/TASK/w2_WEIGHTS/seed_SEED")
    checkpoint_dir: str | None = _option(None, "checkpoints; null: in the run's folder")
    save_model: bool = _option(
        True, "write the trained chain to policy.safetensors beside the checkpoints"
    )
    progress_bar: bool = _option(True, "show speed and remaining time")
    batch_size: int = _option(256, "transitions of an update")
    lr: float = _option(3e-4, "learning rate of every Adam")
    gamma: float = _option(0.99, "discount factor per step")
    tau: float = _option(0.005, "Polyak step of the target critics")
    policy_noise: float = _option(0.2, "std of the target action's noise, in half action ranges")
    noise_clip: float = _option(0.5, "largest magnitude of that noise, in half action ranges")
    policy_freq: int = _option(1, "critic steps per chain of actor steps")
    alpha: float = _option(1.0, "weight of the Q term")
    q_normalization: str | None = _option(
        "mean_abs", "mean_abs: Q term divided by mean |Q|; null: not (the original code)"
    )
    delay_actor: bool = _option(False, "the Polyak copy of actor 0 acts in the TD target")
    num_samples: int = _option(4, "K, actions per state and policy in the Sinkhorn divergence")
    blur: float = _option(0.05, "Sinkhorn blur, in half action ranges")
    w2_backend: str = _option(
        "tensorized",
        "tensorized, online (needs KeOps) or auto (GeomLoss's), fast (the same, ten times faster) "
        "or exact (the optimal assignment, num_samples up to 10)",
    )
    shared_noise: bool = _option(
        False, "the divergence compares two actors under the same z: no pull on their spread"
    )
    hidden_sizes: list[int] = _option([256, 256], "widths of the hidden layers of all networks")
    critic_layer_norm: bool = _option(False, "LayerNorm in the critics")
    data: DataConfig = field(default_factory=DataConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class POGOLossConfig(LossConfig):
    """TorchRL config group ``loss: pogo``: every keyword of :class:`~pogo_torchrl.POGOLoss`."""

    actor_network: Any = None
    qvalue_network: Any = None
    w2_weights: list[float] = field(default_factory=lambda: [0.2, 0.2, 0.2])
    action_spec: Any = None
    bounds: Any = None
    num_qvalue_nets: int = 2
    num_samples: int = 4
    blur: float = 0.05
    w2_backend: str = "tensorized"
    shared_noise: bool = False
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    q_normalization: str | None = "mean_abs"
    alpha: float = 1.0
    delay_actor: bool = False
    delay_qvalue: bool = True
    loss_function: str = "l2"
    reduction: str = "mean"
    deactivate_vmap: bool = False
    use_prioritized_weights: Any = "auto"
    _target_: str = "pogo_torchrl.POGOLoss"

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass
class POGOTrainerConfig(TrainerConfig):
    """TorchRL config group ``trainer: pogo``: keywords of :class:`~pogo_torchrl.POGOTrainer`."""

    loss_module: Any = None
    replay_buffer: Any = None
    total_steps: int = 1_000_000
    lr: float = 3e-4
    policy_freq: int = 1
    tau: float = 0.005
    target_net_updater: Any = None
    compile: bool = False
    checkpoint_dir: str | None = None
    checkpoint_interval: int = 50_000
    keep_checkpoints: int = 2
    progress_bar: bool = True
    hooks: list[Any] = field(default_factory=list)
    _target_: str = "pogo_torchrl.POGOTrainer"

    def __post_init__(self) -> None:
        super().__post_init__()


def options(schema: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """The option names of a run with their meanings and defaults.

    Example:
        >>> options()["lr"]
        'learning rate of every Adam (default 0.0003)'
        >>> "data.path" in options()
        True
    """
    found: dict[str, str] = {}
    for entry in dataclasses.fields(schema):
        default = (
            entry.default_factory()
            if entry.default_factory is not dataclasses.MISSING
            else entry.default
        )
        if dataclasses.is_dataclass(default):
            found.update(options(type(default), f"{prefix}{entry.name}."))
        else:
            yaml = {"None": "null", "True": "true", "False": "false"}
            shown = yaml.get(str(default), default)
            found[prefix + entry.name] = f"{entry.metadata['help']} (default {shown})"
    return found


def top_level_options() -> list[str]:
    """Names of the fields of :class:`RunConfig`."""
    return [entry.name for entry in dataclasses.fields(RunConfig)]


def tasks() -> list[str]:
    """Names of the task presets in the package.

    Example:
        >>> "walker2d-medium-replay-v2" in tasks()
        True
    """
    folder = resources.files("pogo_torchrl") / "conf" / "task"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith("yaml"))


def check_overrides(arguments: Sequence[str]) -> None:
    """Reject misspelt keys and tasks on the command line, before Hydra sees them.

    Raises:
        ValueError: naming the key and the nearest that exist.

    Example:
        >>> check_overrides(["total_step=10"])
        Traceback (most recent call last):
            ...
        ValueError: total_step is no option; did you mean total_steps? (--help lists all)
    """
    known = [*options(), "data"]
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if argument.startswith("-") or not separator:
            continue
        key = key.lstrip("+~")
        if key == "task":
            for task in value.split(","):
                _check_task(task.strip("'\" "))
        elif key not in known and not key.startswith("hydra"):
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"{key} is no option; {hint}(--help lists all)")


def _check_task(task: str) -> None:
    if task not in tasks():
        near = difflib.get_close_matches(task, tasks(), n=3, cutoff=0.3) or tasks()
        raise ValueError(f"task={task} is unknown; did you mean {' or '.join(near)}?")


def _help() -> str:
    width = max(map(len, options())) + 2
    lines = [f"  {name:<{width}}{meaning}" for name, meaning in options().items()]
    return "\n".join(
        [
            "POGO: policy optimization as a gradient flow in offline RL.",
            "",
            "  python examples/pogo_offline.py [option=value ...]",
            "",
            "Options (a task's preset changes some of the defaults):",
            *lines,
            "",
            "Tasks:",
            *(f"  {task}" for task in tasks()),
        ]
    )


def _register() -> None:
    # Hydra interpolates the template: it must see no stray ${...}, and there is none.
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(
        group="hydra/help",
        name="pogo",
        node={"app_name": "pogo", "header": "", "footer": "", "template": _help()},
    )
    store.store(group="loss", name="pogo", node=POGOLossConfig)
    store.store(group="trainer", name="pogo", node=POGOTrainerConfig)


_register()
