"""Memory and cores that this process may use, within the limits of a container or a batch job."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Control groups, by which Linux limits containers and batch jobs (man 7 cgroups).
_MEMBERSHIP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def physical_memory() -> float:
    """Return the memory in bytes that this process may use: the machine's, or a container's limit.

    Returns:
        The number of bytes, or infinity if the system does not report it.

    Example:
        >>> physical_memory() > 1e6
        True
    """
    limits = [*_limits("memory.max", "memory", "memory.limit_in_bytes")]
    with suppress(AttributeError, OSError, ValueError):
        limits.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=math.inf)


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    It is limited by the affinity of the process and the CPU quota of its container. Part of a core
    counts as one.

    Example:
        >>> 1 <= usable_cores() <= os.cpu_count()
        True
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = _limits("cpu.max", "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return max(min([cores, *map(math.ceil, quotas)]), 1)


def _limits(unified: str, controller: str, *files: str) -> Iterator[float]:
    """Limits of this process's control groups and those above them.

    Args:
        unified: file of version 2 with the limit and, for a quota, its period.
        controller: controller of version 1.
        files: its files with the limit and, for a quota, its period.
    """
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    names: tuple[str, ...]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = _GROUPS, (unified,)
        elif controller in controllers.split(","):
            root, names = _GROUPS / controller, files
        else:
            continue
        group = root / path.lstrip("/")
        # In a container, the path may be that of the host, of which only the root is visible.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError, IndexError):  # no such limit, or "max"
                    words = " ".join((folder / name).read_text() for name in names).split()
                    limit = float(words[0])
                    if len(words) > 1:
                        limit /= float(words[1])
                    if limit > 0:  # version 1 writes -1 for no quota
                        yield limit
