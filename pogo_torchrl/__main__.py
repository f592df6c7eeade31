"""Entry point of ``python -m pogo_torchrl``, the same as the command ``pogo``."""

from pogo_torchrl.cli import main

if __name__ == "__main__":
    main()
