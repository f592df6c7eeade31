"""Train a POGO chain offline and evaluate all of its actors.

python examples/pogo_offline.py                          # hopper, local data, a few minutes
python examples/pogo_offline.py task=walker2d-medium-v2 seed=1 total_steps=20000
python examples/pogo_offline.py data.source=hdf5 data.path=FILE
python examples/pogo_offline.py --help                   # all options
"""

import sys

from pogo_torchrl.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
