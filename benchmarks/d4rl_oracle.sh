#!/usr/bin/env bash
# Compare our environments with D4RL's own: sets up a Python 3.10 environment from packages (once,
# 5 GB with PyTorch) and prints Markdown. MuJoCo 2.1.0's bindings are built at the first import.
#
#   apt-get install libosmesa6-dev libgl1-mesa-dev libglew-dev patchelf gcc python3.10-venv
#   PYTHON=python3.10 benchmarks/d4rl_oracle.sh [FOLDER] [arguments of d4rl_oracle.py]
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-$HOME/.cache/pogo_torchrl/d4rl_oracle}
if (($#)); then shift; fi

if ! command -v patchelf > /dev/null; then
    echo "patchelf is missing: apt-get install libosmesa6-dev libgl1-mesa-dev libglew-dev patchelf" >&2
    exit 1
fi
if [ ! -e "$venv/complete" ]; then
    "${PYTHON:-python3.10}" -m venv "$venv"
    # The pip shipped with Python 3.10 does not find compatible versions.
    "$venv/bin/pip" install --quiet --upgrade pip
    "$venv/bin/pip" install --quiet --editable "$repository[d4rl]"
    touch "$venv/complete"
fi
exec "$venv/bin/python" "$repository/benchmarks/d4rl_oracle.py" "$@"
