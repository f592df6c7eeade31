"""Run all speed benchmarks and print their tables as Markdown.

    python benchmarks/run.py [--quick]

With --quick, only the three-actor update, one evaluation task and one transport size: about two
minutes on two cores, mostly compilation.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("training.py", "evaluation.py", "transport.py", "stack.py")
# One task is enough: the others take longer, but run the same code.
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
