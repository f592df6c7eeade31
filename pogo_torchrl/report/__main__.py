"""``python -m pogo_torchrl.report``: the same as the command ``pogo report``."""

import sys

from pogo_torchrl.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
