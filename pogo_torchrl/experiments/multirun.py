"""Several runs from one command line, ``pogo train --multirun lr=1e-4,3e-4``, by Hydra."""

from __future__ import annotations

import re
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from pogo_torchrl.experiments.config import to_text

# Options by which the folders of runs differ anyway.
_IN_FOLDER = {
    "task", "algorithm", "chain", "w2_weights", "step_sizes", "seed", "log_dir", "variant",
}  # fmt: skip


def variant_of(*names: str, _root_: Any) -> str:
    """Text for ``variant`` that tells the values of options, ``lr_0.0001_batch_size_64``.

    Characters that are not allowed in folders on some systems are replaced; a checksum then keeps
    values apart.

    Args:
        names: names of the options.
        _root_: the configuration that contains them.
    """
    parts = []
    for name in names:
        value = OmegaConf.select(_root_, name)
        values = list(value) if OmegaConf.is_list(value) else [value]
        text = "-".join(f"{v:g}" if isinstance(v, float) else to_text(v) for v in values)
        clean = re.sub(r"[^\w.+-]+", "-", text)[:40]
        if clean != text:
            clean += f"-{zlib.crc32(text.encode()):08x}"
        parts.append(f"{name.rpartition('.')[2]}_{clean}")
    return "_".join(parts)


# ``variant: ${variant_of:lr,batch_size}`` names a folder by these options.
OmegaConf.register_new_resolver("variant_of", variant_of, replace=True)


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for several runs."""
    return not {"-m", "--multirun"}.isdisjoint(arguments)


def with_variant(arguments: Sequence[str]) -> list[str]:
    """Add the option ``variant``, so that each of several runs has a folder of its own.

    Args:
        arguments: arguments of ``pogo train``, which have been checked.

    Returns:
        The arguments, unchanged if they set ``variant``, or if ``task``, ``algorithm``,
        ``w2_weights`` and ``seed`` are all that differs.

    Example:
        >>> with_variant(["-m", "seed=0,1", "lr=1e-4,3e-4", "data.size=choice(10,20)"])[-1]
        "variant='${variant_of:lr,data.size}'"
        >>> with_variant(["-m", "seed=0,1"])
        ['-m', 'seed=0,1']
    """
    names, given = [], list(arguments)
    for argument in given:
        if argument.startswith("-") or "=" not in argument:
            continue
        override = OverridesParser.create().parse_override(argument)
        if override.key_or_group == "variant":
            return given
        if override.is_sweep_override() and not override.is_hydra_override():
            names.append(override.key_or_group)
    differ = [name for name in names if name not in _IN_FOLDER]
    return [*given, f"variant='${{variant_of:{','.join(differ)}}}'"] if differ else given


@contextmanager
def without_files(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Let Hydra keep its own files of a multirun in a temporary folder.

    Args:
        arguments: arguments of ``pogo train``.

    Returns:
        Context manager that yields the arguments; unchanged if they choose a folder.
    """
    if not is_multirun(arguments) or any(a.startswith("hydra.sweep.dir=") for a in arguments):
        yield list(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield [*arguments, f"hydra.sweep.dir='{folder}'"]


class FailedJobs:
    """The runs of a multirun that have failed, which do not keep the others from running."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within a job, note an exit instead of ending the process, unless a signal asks for it."""
        try:
            yield
        except SystemExit as end:
            job = HydraConfig.get()
            stopped = isinstance(end.code, int) and end.code >= 128
            if job.mode != RunMode.MULTIRUN or stopped:
                raise
            self.found.append(" ".join(job.overrides.task))

    def report(self) -> None:
        """Exit with code 1 and the list of the failed runs, if there are any."""
        found, self.found = self.found, []
        if found:
            print(f"pogo: {len(found)} run(s) failed:", file=sys.stderr)
            print("\n".join(f"  {job}" for job in found), file=sys.stderr)
            sys.exit(1)
