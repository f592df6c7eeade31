"""All tables of speed, one after the other, as Markdown.

    python benchmarks/run.py [--quick]

Quick: the three-actor update, one task of the evaluation and one size of the transport, in about
two minutes on two cores, most of which compile.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("training.py", "evaluation.py", "transport.py", "stack.py")
# The rest is what takes long without trying anything else.
QUICK = {"evaluation.py": ["--task", "halfcheetah-medium-v2"]}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments not in ([], ["--quick"]):
        raise SystemExit(__doc__)
    for script in SCRIPTS:
        print(f"\n# {script}\n", flush=True)
        path = Path(__file__).with_name(script)
        others = QUICK.get(script, []) if arguments else []
        subprocess.run([sys.executable, path, *arguments, *others], check=True)


if __name__ == "__main__":
    main()
