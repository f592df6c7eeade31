"""Names of tasks and algorithms, and the weights published for the tasks."""

from __future__ import annotations

from importlib import resources

from hydra.core.config_store import ConfigStore

_PUBLISHED_WEIGHTS = {
    "halfcheetah-medium-v2": (0.01, 0.3),
    "halfcheetah-medium-replay-v2": (0.05, 0.1),
    "halfcheetah-medium-expert-v2": (0.4, 0.3),
    "hopper-medium-v2": (0.1, 0.5),
    "hopper-medium-replay-v2": (0.25, 0.1),
    "hopper-medium-expert-v2": (0.3, 0.2),
    "walker2d-medium-v2": (0.25, 0.2),
    "walker2d-medium-replay-v2": (0.1, 0.5),
    "walker2d-medium-expert-v2": (0.25, 0.3),
    "antmaze-umaze-v2": (0.5, 0.5),
    "antmaze-umaze-diverse-v2": (0.2, 0.5),
    "antmaze-medium-play-v2": (0.05, 0.3),
    "antmaze-medium-diverse-v2": (0.05, 0.3),
    "antmaze-large-play-v2": (0.01, 0.3),
    "antmaze-large-diverse-v2": (0.05, 0.3),
}


def published_weights(task: str) -> list[float]:
    """``w2_weights`` published for a task with the original code, the second one repeated.

    Args:
        task: name of the task.

    Raises:
        ValueError: if none are published for it.

    Example:
        >>> published_weights("hopper-medium-v2")
        [0.1, 0.5, 0.5]
    """
    if task not in _PUBLISHED_WEIGHTS:
        raise ValueError(f"no weights are published for task={task}: set w2_weights.")
    first, second = _PUBLISHED_WEIGHTS[task]
    return [first, second, second]


def tasks() -> list[str]:
    """Names of all task presets.

    Example:
        >>> "walker2d-medium-replay-v2" in tasks()
        True
    """
    folder = resources.files("pogo_torchrl.experiments") / "conf" / "task"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith("yaml"))


def algorithms() -> list[str]:
    """Names of all algorithms, which have presets of their own.

    Example:
        >>> algorithms()
        ['iql', 'original', 'paper', 'pogo', 'rebrac', 'returns', 'td3_bc']
    """
    folder = resources.files("pogo_torchrl.experiments") / "conf" / "algorithm"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith("yaml"))


def all_tasks() -> list[str]:
    """Names of all tasks of D4RL that have an environment here.

    Those without a preset have the defaults of all options.

    Example:
        >>> "hopper-random-v2" in all_tasks(), "hopper-random-v2" in tasks()
        (True, False)
    """
    environments = sorted({task.split("-")[0] for task in tasks()} - {"antmaze"})
    levels = ("random", "expert", "full-replay")
    return [*tasks(), *(f"{name}-{level}-v2" for name in environments for level in levels)]


def own_tasks() -> list[str]:
    """Names of the tasks of one's own that are presets in this process."""
    return [name.removesuffix(".yaml") for name in ConfigStore.instance().repo.get("task", {})]
