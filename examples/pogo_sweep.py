"""Run the sweep of a sweep file and tabulate its results; run it again to complete missing runs.

python examples/pogo_sweep.py sweep=FILE
python examples/pogo_sweep.py sweep=locomotion data.source=local total_steps=20000 dry_run=true
python examples/pogo_sweep.py --help                     # all options
"""

import sys

from pogo_torchrl.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
