"""Names of tasks and algorithms."""

from __future__ import annotations

from importlib import resources

from hydra.core.config_store import ConfigStore


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
        ['iql', 'paper', 'pogo', 'rebrac', 'td3_bc']
    """
    folder = resources.files("pogo_torchrl.experiments") / "conf" / "algorithm"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith("yaml"))


def all_tasks() -> list[str]:
    """Names of all tasks of D4RL that have an environment here.

    Those without a preset, for which no weights are published, have the defaults of all options.

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
