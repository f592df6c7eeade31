"""Command line: ``python -m pogo_torchrl.report log_dir=logs results_dir=results``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pogo_torchrl.report.write import write_report

_DEFAULTS = {"log_dir": "logs", "results_dir": "results"}

_HELP = """\
Writes tables, figures and a one-page summary of all runs, also of half-finished ones.

  log_dir=logs          the folder that the runs were written to
  results_dir=results   where to write"""


def main(arguments: Sequence[str]) -> None:
    """Write a report as the arguments ``option=value`` say.

    Exit code 2 after one sentence for bad input and for files that cannot be written.
    """
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return
    options = dict(_DEFAULTS)
    try:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name not in options or not value:
                raise ValueError(
                    f"{argument} is no option; give log_dir=FOLDER or results_dir=FOLDER."
                )
            options[name] = value
        print(f"Report: {write_report(**options)}")
    except (ValueError, OSError) as error:
        print(f"pogo: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
