"""The options of runs and sweeps, as dataclasses.

Importing this module also registers ``loss: pogo`` and ``trainer: pogo`` in TorchRL's Hydra groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pogo_torchrl.experiments.torchrl_configs import POGOLossConfig, POGOTrainerConfig

# ``${local_data:${data.source},x,y}`` in a preset: x, tuned on the local data, goes with them only.
OmegaConf.register_new_resolver(
    "local_data",
    lambda source, local, other: local if source == "local" else other,
    replace=True,
)


def option(default: Any, help: str, *, lowest: int = 1, highest: int | None = None) -> Any:
    """A field; ``lowest`` and ``highest`` bound it where it holds integers."""
    metadata = {"help": help, "lowest": lowest, "highest": highest}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Where the transitions come from."""

    source: str = option(
        "local",
        "local (rolled out here from bundled policies), d4rl (downloaded), minari or hdf5 (a file "
        "in D4RL's layout)",
    )
    path: str | None = option(None, "the file, with hdf5; the dataset's id, with minari")
    mirror: str | None = option(
        None, "address or folder of a copy of D4RL's files, with d4rl; null: D4RL's own server"
    )
    size: int = option(
        100_000, "transitions to roll out, with data.source=local", highest=100_000_000
    )
    seed: int = option(
        0,
        "seed of these rollouts; the training's seed leaves the data alone",
        lowest=0,
        highest=2**32 - 1,
    )
    cache_dir: str | None = option(
        None, "folder of rollouts and downloads; null: pogo_torchrl in your cache folder (~/.cache)"
    )
    normalize: bool = option(True, "normalise observations by the data's mean and std")
    reward_shift: float = option(0.0, "added to every reward (presets: -1 for antmaze)")


@dataclass
class EnvConfig:
    """Where policies are evaluated."""

    backend: str = option(
        "mujoco", "mujoco (D4RL's physics on the installed MuJoCo) or d4rl (D4RL's own, an extra)"
    )
    id: str | None = option(None, "another Gymnasium environment; null: the task's own")
    max_episode_steps: int | None = option(None, "horizon of an episode; null: the task's own")


@dataclass
class LoggerConfig:
    """Where numbers go beside the CSV files."""

    backend: str | None = option(None, "tensorboard or wandb, beside the CSV files; null: none")


@dataclass
class RunConfig:
    """Every option of ``examples/pogo_offline.py``; ``--help`` prints them."""

    task: str = option("hopper-medium-v2", "D4RL task; its preset sets w2_weights and lr")
    seed: int = option(
        0, "seed of initialisation, sampling, noise and evaluation", lowest=0, highest=2**32 - 1
    )
    w2_weights: list[float] = option([0.2, 0.2, 0.2], "w_i, one for each actor of the chain")
    total_steps: int = option(2000, "updates; the papers use 1000000")
    eval_interval: int = option(500, "updates between evaluations; one always ends the run")
    eval_episodes: int = option(
        10, "episodes per actor and action mode of an evaluation", highest=10_000
    )
    log_interval: int = option(250, "updates between rows of metrics.csv")
    checkpoint_interval: int = option(1000, "updates between checkpoints; one always ends the run")
    resume: bool = option(False, "go on from the newest checkpoint of the same run")
    device: str = option("auto", "auto (a GPU where there is one), cpu or cuda")
    compile: str = option(
        "auto", "torch.compile of the update: true, false, or auto (from 10000 total_steps on)"
    )
    bf16: bool = option(False, "networks in bfloat16 during updates, never for acting")
    deterministic: bool = option(
        False, "bit-identical repetition on a GPU, slower; a CPU always repeats"
    )
    log_dir: str = option("logs", "runs are written to LOG_DIR/TASK/w2_WEIGHTS/seed_SEED")
    checkpoint_dir: str | None = option(None, "checkpoints; null: in the run's folder")
    save_model: bool = option(
        True, "write the trained chain to policy.safetensors beside the checkpoints"
    )
    progress_bar: bool = option(True, "show speed and remaining time")
    batch_size: int = option(256, "transitions of an update")
    lr: float = option(3e-4, "learning rate of every Adam")
    lr_actor: float | None = option(None, "that of the actors; null: lr")
    lr_critic: float | None = option(None, "that of the critics; null: lr")
    lr_schedule: str = option(
        "constant", "of the learning rates over total_steps: constant, linear (to 0) or cosine"
    )
    lr_schedule_actor: str | None = option(None, "that of the actors; null: lr_schedule")
    lr_schedule_critic: str | None = option(None, "that of the critics; null: lr_schedule")
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW); 0: Adam")
    clip_grad_norm: float | None = option(
        None, "largest norm of a network's gradient; null: not clipped"
    )
    gamma: float = option(0.99, "discount factor per step")
    tau: float = option(0.005, "Polyak step of the target critics")
    policy_noise: float = option(0.2, "std of the target action's noise, in half action ranges")
    noise_clip: float = option(0.5, "largest magnitude of that noise, in half action ranges")
    policy_freq: int = option(1, "critic steps per chain of actor steps")
    alpha: float = option(1.0, "weight of the Q term")
    q_normalization: str | None = option(
        "mean_abs", "mean_abs: Q term divided by mean |Q|; null: not (the original code)"
    )
    delay_actor: bool = option(False, "the Polyak copy of actor 0 acts in the TD target")
    num_samples: int = option(4, "K, actions per state and policy in the Sinkhorn divergence")
    blur: float = option(0.05, "Sinkhorn blur, in half action ranges")
    w2_backend: str = option(
        "fast",
        "fast (GeomLoss's divergence, faster), tensorized, online (needs KeOps) or auto "
        "(GeomLoss's own), or exact (the optimal assignment, num_samples up to 10)",
    )
    w2_fraction: float = option(
        1.0, "share of a batch's states on which the divergence is evaluated, in (0, 1]"
    )
    shared_noise: bool = option(
        False, "the divergence compares two actors under the same z: no pull on their spread"
    )
    hidden_sizes: list[int] = option([256, 256], "widths of the hidden layers of all networks")
    critic_layer_norm: bool = option(False, "LayerNorm in the critics")
    data: DataConfig = field(default_factory=DataConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class SlurmConfig:
    """What a job on a cluster asks for; null: what the cluster gives by default."""

    partition: str | None = option(None, "the partition, or several: a,b")
    timeout_min: int = option(240, "minutes; a job that needs more is queued again and goes on")
    gpus_per_node: int | None = option(None, "GPUs of a job", lowest=0)
    cpus_per_task: int | None = option(None, "cores of a job, shared by its runs")
    mem_gb: int | None = option(None, "gigabytes of memory of a job")
    array_parallelism: int = option(256, "jobs of an array that run at once")
    runs_per_job: int = option(1, "runs of a job at once, side by side on its GPU or GPUs")
    signal_delay_s: int = option(90, "seconds before its time is up when a job saves")
    additional_parameters: dict[str, Any] = option(
        {}, "any other options of sbatch: {qos: long, account: me}"
    )


@dataclass
class SweepConfig(RunConfig):
    """Every option of ``examples/pogo_sweep.py``: its own, and all of a run."""

    sweep: str | None = option(
        None, "the sweep file, or the name of one in the package: locomotion, antmaze"
    )
    results_dir: str = option("results", "tables and figures over all runs of log_dir")
    launcher: str = option(
        "local",
        "what carries out the runs: local (processes here), slurm (a cluster) or submitit_local "
        "(the cluster's jobs as processes here, all at once, to try them)",
    )
    jobs: int | None = option(
        None,
        "runs at once, with launcher=local; null: one for each GPU, or usable cores / "
        "OMP_NUM_THREADS (1 where that is not set)",
    )
    stack: bool = option(
        False,
        "train the runs of a task that differ in seed, w2_weights or alpha only in one process, as "
        "one batched computation",
    )
    dry_run: bool = option(False, "print the plan and end")
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def options(schema: type = RunConfig) -> dict[str, str]:
    """The option names of a run (or of another command) with their meanings and defaults.

    Example:
        >>> options()["lr"]
        'learning rate of every Adam (default 0.0003)'
        >>> "data.path" in options()
        True
    """
    return {
        name: f"{entry.metadata['help']} (default {to_text(default)})"
        for name, entry, _, default in iter_options(schema)
    }


def option_lines(options: Mapping[str, str]) -> list[str]:
    """Options with their meanings, one a line, as ``--help`` prints them."""
    width = max(map(len, options)) + 2
    return [f"  {name:<{width}}{meaning}" for name, meaning in options.items()]


def to_text(value: Any) -> str:
    """A value as it is written on the command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def iter_options(
    schema: type = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field, Any, Any]]:
    """Name, field, type and default of every option."""
    hints = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        default = (
            entry.default_factory()
            if entry.default_factory is not dataclasses.MISSING
            else entry.default
        )
        if dataclasses.is_dataclass(default):
            yield from iter_options(type(default), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, hints[entry.name], default


def top_level_options() -> list[str]:
    """Names of the fields of :class:`RunConfig`."""
    return [entry.name for entry in dataclasses.fields(RunConfig)]


def tasks() -> list[str]:
    """Names of the task presets in the package.

    Example:
        >>> "walker2d-medium-replay-v2" in tasks()
        True
    """
    folder = resources.files("pogo_torchrl.experiments") / "conf" / "task"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith("yaml"))


def _help() -> str:
    return "\n".join(
        [
            "Train a chain of actors on one task, and evaluate every actor.",
            "",
            "  pogo train [option=value ...]",
            "",
            "Options (a task's preset changes some of the defaults):",
            *option_lines(options()),
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
