"""Options of runs and sweeps, as dataclasses."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pogo_torchrl.experiments.presets import all_tasks, published_weights, tasks

# ``${local_data:${data.source},x,y}`` in a preset: x, which was tuned on the local data, applies to
# data.source=local only; y applies to all other sources.
OmegaConf.register_new_resolver(
    "local_data",
    lambda source, local, other: local if source == "local" else other,
    replace=True,
)

OmegaConf.register_new_resolver("published_weights", published_weights, replace=True)

# ``${task_env:${env.id},x}`` in a preset: x applies to the environments of the package only; others
# have their own.
OmegaConf.register_new_resolver(
    "task_env",
    lambda env_id, value: value if str(env_id).startswith("pogo_torchrl/") else None,
    replace=True,
)


def option(
    default: Any,
    help: str,
    *,
    lowest: int = 1,
    highest: int | None = None,
    path: bool = False,
) -> Any:
    """Dataclass field of an option.

    Args:
        default: the default value.
        help: what the option does, as ``--help`` prints it.
        lowest: smallest allowed value of an integer. Defaults to ``1``.
        highest: largest allowed value of an integer; ``None``: no limit. Defaults to ``None``.
        path: whether the value is a file or folder, in which ``~`` and environment variables are
            expanded. Defaults to ``False``.

    Returns:
        A :func:`dataclasses.field` with this metadata.
    """
    metadata = {"help": help, "lowest": lowest, "highest": highest, "path": path}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Source and preprocessing of the offline data."""

    source: str = option(
        "local",
        "where the data come from: local (rolled out here from bundled policies), d4rl "
        "(downloaded), minari (a Minari dataset) or hdf5 (a file in D4RL's layout)",
    )
    path: str | None = option(
        None, "HDF5 file (data.source=hdf5) or Minari dataset ID (data.source=minari)", path=True
    )
    mirror: str | None = option(
        None,
        "URL or folder of a copy of D4RL's files (data.source=d4rl); null: D4RL's own server",
        path=True,
    )
    size: int = option(
        100_000, "number of transitions to roll out (data.source=local)", highest=100_000_000
    )
    seed: int = option(
        0,
        "seed of the rollouts (data.source=local), independent of the training seed",
        lowest=0,
        highest=2**32 - 1,
    )
    cache_dir: str | None = option(
        None,
        "folder for rollouts and downloads; null: pogo_torchrl in your cache folder (~/.cache)",
        path=True,
    )
    normalize: bool = option(
        True, "normalise observations by the mean and standard deviation of the data"
    )
    reward_shift: float = option(0.0, "constant added to every reward (antmaze presets: -1)")
    clip_actions: bool = option(
        False, "clip the actions of the data to the environment's bounds; false: reject others"
    )


@dataclass
class EnvConfig:
    """Evaluation environment."""

    backend: str = option(
        "mujoco",
        "evaluation environment: mujoco (D4RL's physics on the installed MuJoCo) or d4rl (the d4rl "
        "package, an extra)",
    )
    id: str | None = option(
        None,
        "Gymnasium ID of the evaluation environment, or MODULE:ID (MODULE may lie in the current "
        "folder); minari: that of the Minari dataset; null: none, trains without evaluation",
    )
    kwargs: dict[str, Any] = option({}, "arguments of the environment, e.g. {goal: 3}")
    max_episode_steps: int | None = option(
        None, "maximum length of an evaluation episode in steps; null: the environment's own"
    )
    reference_scores: list[float] | None = option(
        None,
        "returns that score 0 and 100, [low,high]; null: D4RL's or the Minari dataset's, otherwise "
        "plain returns are shown",
    )
    action_bounds: list[Any] | None = option(
        None,
        "bounds [low,high] of the actions, numbers for all or lists with one number per dimension, "
        "[[-1,-2],[1,2]]; null: the environment's or, without one, [-1,1]",
    )


@dataclass
class LoggerConfig:
    """Loggers in addition to the CSV files."""

    backend: str | None = option(
        None, "logger besides the CSV files: csv, mlflow, trackio, tensorboard, wandb; null: none"
    )
    project: str | None = option(
        None, "project (wandb, trackio); null: the environment's (WANDB_PROJECT), or pogo"
    )
    group: str | None = option(None, "group of the run (wandb); null: the task")
    tags: list[str] | None = option(None, "tags of the run (wandb), [a,b]; null: none")


@dataclass
class RunConfig:
    """Options of ``pogo train``; ``pogo train --help`` prints them."""

    task: str = option(
        "hopper-medium-v2",
        "D4RL task, whose preset sets w2_weights, lr and others; or the name or YAML file of a "
        "task of your own (docs/tasks.md)",
    )
    seed: int = option(
        0, "seed of initialisation, sampling, noise and evaluation", lowest=0, highest=2**32 - 1
    )
    algorithm: str = option(
        "pogo",
        "pogo; returns or original (pogo with the setting of D4RL's presets, or with the published "
        "weights); or a chain on top of td3_bc, iql, rebrac or paper (POGO with Gaussian policies)",
    )
    chain: int | None = option(
        None,
        "number of actors on top of another algorithm than pogo (0: that algorithm alone), with "
        "step_sizes of 0.1 if none are given; null: as many as step_sizes or w2_weights say",
        lowest=0,
        highest=31,
    )
    w2_weights: list[float] = option(
        [0.2, 0.2, 0.2],
        "weight w_i of each actor's distance term; one per actor of the chain (other algorithms "
        "than pogo: one per actor on top)",
    )
    step_sizes: list[float] | None = option(
        None, "step size h_i of each actor, > 0; sets w2_weights for the given alpha"
    )
    total_steps: int = option(3000, "number of training updates; the papers use 1000000")
    eval_interval: int = option(
        500,
        "updates between evaluations; a run always ends with one; 0: none, needs no environment",
        lowest=0,
    )
    eval_episodes: int = option(
        10,
        "episodes of an evaluation, per actor and action mode (deterministic, stochastic)",
        highest=10_000,
    )
    eval_envs: int | None = option(
        None,
        "largest number of environments that exist at once; null: 1, or as memory allows for those "
        "of Gymnasium and of this package",
    )
    log_interval: int = option(250, "updates between rows of metrics.csv")
    checkpoint_interval: int = option(
        1000, "updates between checkpoints; a run always ends with one"
    )
    resume: bool = option(False, "continue from the newest checkpoint of the same run")
    device: str = option("auto", "device to train on: auto (a GPU if available), cpu or cuda")
    compile: str = option(
        "auto", "torch.compile the update: true, false or auto (if total_steps >= 10000)"
    )
    bf16: bool = option(False, "run the networks in bfloat16 during updates, but not for acting")
    deterministic: bool = option(
        False, "bitwise reproducible runs on a GPU, at lower speed; runs on a CPU always are"
    )
    log_dir: str = option(
        "logs", "folder for all runs; a run writes to LOG_DIR/TASK/w2_WEIGHTS/seed_SEED", path=True
    )
    variant: str | None = option(
        None,
        "name of runs that differ in other options than task, w2_weights and seed, which becomes "
        "part of their folder: TASK/w2_WEIGHTS_VARIANT/seed_SEED; set by --multirun",
    )
    checkpoint_dir: str | None = option(
        None, "folder for checkpoints; null: in the run's folder", path=True
    )
    save_model: bool = option(
        True, "write the trained chain to policy.safetensors next to the checkpoints"
    )
    progress_bar: bool = option(True, "show a progress bar with speed and remaining time")
    batch_size: int = option(256, "transitions per update")
    lr: float = option(3e-4, "learning rate of all Adam optimizers")
    lr_actor: float | None = option(None, "learning rate of the actors; null: lr")
    lr_critic: float | None = option(None, "learning rate of the critics; null: lr")
    lr_schedule: str = option(
        "constant",
        "learning rate schedule over total_steps: constant, linear or cosine (both to 0)",
    )
    lr_schedule_actor: str | None = option(
        None, "learning rate schedule of the actors; null: lr_schedule"
    )
    lr_schedule_critic: str | None = option(
        None, "learning rate schedule of the critics; null: lr_schedule"
    )
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW), >= 0; 0: Adam")
    clip_grad_norm: float | None = option(
        None, "maximum gradient norm of each network, > 0; null: no clipping"
    )
    gamma: float = option(0.99, "discount factor per step, in [0, 1]")
    tau: float = option(0.005, "Polyak averaging rate of the target critics, in (0, 1]")
    policy_noise: float = option(
        0.2, "standard deviation of the target action noise, in units of half the action range"
    )
    noise_clip: float = option(
        0.5, "clipping bound of the target action noise, in units of half the action range"
    )
    policy_freq: int = option(1, "critic updates per update of the actors")
    freeze_critics_at: float | None = option(
        None,
        "number of updates, or fraction of total_steps in (0, 1), after which critics and actor 0 "
        "are frozen and actors 1, 2, ... are trained, from copies of actor 0; null: train all "
        "networks throughout",
    )
    alpha: float = option(1.0, "weight of the Q term, > 0")
    displacement: float | None = option(
        None,
        "adapt alpha so that actor 0's mean squared distance from the data (bc_mse) is held at "
        "this value, > 0, e.g. 0.06; null: constant alpha",
    )
    alpha_growth: float = option(
        1.0, "factor by which alpha grows over total_steps, > 0 (geometrically); 1: constant alpha"
    )
    q_normalization: str | None = option(
        "mean_abs",
        "mean_abs: divide the Q term by mean |Q|; null: do not (as in the original code)",
    )
    delay_actor: bool = option(False, "use a Polyak-averaged copy of actor 0 in the TD target")
    num_samples: int = option(
        4, "K, number of actions per state and policy in the Sinkhorn divergence"
    )
    blur: float = option(
        0.05, "blur of the Sinkhorn divergence, > 0, in units of half the action range"
    )
    w2_backend: str = option(
        "fast",
        "solver of the distance: fast (GeomLoss's divergence, faster), tensorized, online (needs "
        "KeOps) or auto (GeomLoss's own), or exact (optimal assignment, num_samples <= 10)",
    )
    w2_fraction: float = option(
        1.0, "fraction of a batch's states on which the divergence is evaluated, in (0, 1]"
    )
    shared_noise: bool = option(
        False,
        "use the same noise z for both actors of a divergence, which puts no pull on their spread",
    )
    hidden_sizes: list[int] = option([256, 256], "widths of the hidden layers of all networks")
    critic_hidden_sizes: list[int] | None = option(
        None, "widths of the hidden layers of the critics; null: hidden_sizes"
    )
    num_critics: int = option(
        2, "number of critics; the TD target uses their minimum, the actors actor_q", highest=100
    )
    actor_q: str = option(
        "first",
        "Q in the losses of the actors: first, or mean over the critics; of the actors on top of "
        "another algorithm also min, or advantage (iql)",
    )
    target_action: str = option(
        "noisy",
        "action of actor 0 in the TD target: noisy, or min_clean_noisy (the smaller value of the "
        "actions with and without noise)",
    )
    actor_bc_weight: float | None = option(
        None, "weight of the actor's squared distance from the data, >= 0 (algorithm=rebrac)"
    )
    critic_bc_weight: float = option(
        0.0,
        "weight of the squared distance of the TD target's action from the data's next action, "
        ">= 0 (ReBRAC)",
    )
    advantage_temperature: float | None = option(
        None,
        "temperature, > 0, of weights exp(advantage / temperature) of the data's actions in the "
        "distance term of actor 0; null: equal weights",
    )
    data_weight: float = option(
        0.0, "share of the distance to the data in the distance term of actors 1, 2, ..., in [0, 1]"
    )
    return_temperature: float | None = option(
        None,
        "temperature, > 0, of weights exp(return / temperature) of the data's episodes in that "
        "share, with returns scaled to [0, 1]; null: equal weights",
    )
    chain_init: str = option(
        "independent",
        "initial weights of actors 1, 2, ...: independent, or copy (those of actor 0)",
    )
    average_actors: float | None = option(
        None,
        "rate of Polyak averages of the actors, in (0, 1], which are then evaluated and exported "
        "instead of the raw weights; null: no averages",
    )
    critic_layer_norm: bool = option(False, "use LayerNorm in the critics")
    data: DataConfig = field(default_factory=DataConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class SlurmConfig:
    """Resources of a cluster job; ``null``: the cluster's default."""

    partition: str | None = option(
        None, "Slurm partition, or several: a,b; null: the cluster's default"
    )
    timeout_min: int = option(
        240, "time limit of a job in minutes; a job that needs more is requeued and resumes"
    )
    gpus_per_node: int | None = option(None, "GPUs per job; null: the cluster's default", lowest=0)
    cpus_per_task: int | None = option(
        None, "CPU cores per job, shared by its runs; null: the cluster's default"
    )
    mem_gb: int | None = option(None, "memory per job in gigabytes; null: the cluster's default")
    array_parallelism: int = option(256, "maximum number of jobs of an array that run at once")
    runs_per_job: int = option(1, "runs that a job trains in parallel on its GPU or GPUs")
    signal_delay_s: int = option(90, "seconds before the time limit at which a job saves")
    additional_parameters: dict[str, Any] = option(
        {}, "further options of sbatch, e.g. {qos: long, account: me}"
    )


@dataclass
class SweepConfig(RunConfig):
    """Options of ``pogo sweep``: its own, and those of its runs."""

    sweep: str | None = option(
        None, "sweep file (YAML), or the name of a bundled one: locomotion, antmaze", path=True
    )
    results_dir: str = option(
        "results", "folder for tables and figures over all runs in log_dir", path=True
    )
    launcher: str = option(
        "local",
        "where the runs execute: local (processes on this machine), slurm (a cluster) or "
        "submitit_local (the cluster's jobs as local processes, all at once, for testing)",
    )
    jobs: int | None = option(
        None,
        "processes in parallel (launcher=local); null: one per GPU or, without a GPU, usable "
        "cores / OMP_NUM_THREADS (1 if unset)",
    )
    stack: bool = option(
        False,
        "train runs of a task that differ only in seed, w2_weights or alpha in one process, as "
        "one batched computation",
    )
    dry_run: bool = option(False, "print the plan and exit")
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def options(schema: type = RunConfig) -> dict[str, str]:
    """Help texts of all options of a command.

    Args:
        schema: dataclass of the options. Defaults to :class:`RunConfig`.

    Returns:
        Meaning and default of each option, by name.

    Example:
        >>> options()["lr"]
        'learning rate of all Adam optimizers (default 0.0003)'
        >>> "data.path" in options()
        True
    """
    return {
        name: f"{entry.metadata['help']} (default {to_text(default)})"
        for name, entry, _, default in iter_options(schema)
    }


def option_lines(options: Mapping[str, str]) -> list[str]:
    """Lines of ``--help``: the options with their meanings, wrapped to the terminal.

    Args:
        options: help texts by option name, see :func:`options`.
    """
    width = max(map(len, options)) + 4
    columns = max(shutil.get_terminal_size((100, 24)).columns, width + 40)
    return [
        textwrap.fill(
            f"  {name:<{width - 2}}{meaning}",
            columns,
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, meaning in options.items()
    ]


def to_text(value: Any) -> str:
    """Format a value as it is written on the command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def iter_options(
    schema: type = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field, Any, Any]]:
    """Iterate over all options of a command, including nested ones.

    Args:
        schema: dataclass of the options. Defaults to :class:`RunConfig`.
        prefix: prepended to the names. Defaults to ``""``.

    Returns:
        Iterator over name (``"data.path"``), field, type and default.
    """
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
    """Field names of :class:`RunConfig`; nested options count as one."""
    return [entry.name for entry in dataclasses.fields(RunConfig)]


def _help() -> str:
    return "\n".join(
        [
            "Train a chain of actors on one task, and evaluate every actor.",
            "",
            "  pogo train [option=value ...]",
            "",
            "Options (the preset of a task overrides some defaults):",
            *option_lines(options()),
            "",
            "Tasks:",
            *(f"  {task}" for task in all_tasks()),
        ]
    )


def _register() -> None:
    # Hydra interpolates the template, so the help texts must not contain ${...}.
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for task in set(all_tasks()) - set(tasks()):
        env = {"id": f"pogo_torchrl/{task}", "max_episode_steps": 1000}
        store.store(group="task", name=task, node={"task": task, "env": env}, package="_global_")
    store.store(
        group="hydra/help",
        name="pogo",
        node={"app_name": "pogo", "header": "", "footer": "", "template": _help()},
    )


_register()
