#!/usr/bin/env bash
# The wheel in empty environments with the lowest and the highest declared versions of all
# dependencies, the suite on both, and on TorchRL's nightly build:
#
#     tests/versions.sh [PYTEST ARGUMENTS]
#
# Makes one virtual environment after the other in a temporary folder, some GB each. Needs
# python3.10 and python3.12 (PYTHON_OLD, PYTHON_NEW name others, such as python3.13); ONLY=nightly
# runs one of them.
set -euo pipefail
cd "$(dirname "$0")/.."
old=${PYTHON_OLD:-python3.10} new=${PYTHON_NEW:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=()

"$new" -m venv "$folder/tools"
"$folder/tools/bin/pip" install -q --disable-pip-version-check build twine uv
"$folder/tools/bin/python" -m build -o "$folder/dist" . > "$folder/build.log" || {
    cat "$folder/build.log"
    exit 1
}
"$folder/tools/bin/twine" check --strict "$folder"/dist/*

pip() { # COMMAND [ARGUMENTS]
    local command=$1
    shift
    "$folder/tools/bin/uv" pip "$command" -q --python "$folder/venv/bin/python" "$@"
}

commands() { # the wheel's commands, away from the sources
    local bin=$folder/venv/bin
    mkdir "$folder/work" && cd "$folder/work" \
        && "$bin/pogo" --version \
        && "$bin/python" -c "import pogo_torchrl; print(pogo_torchrl.__file__)" \
        && "$bin/pogo" train total_steps=60 eval_interval=30 eval_episodes=2 data.size=2000 \
            data.cache_dir=cache progress_bar=false \
        && "$bin/pogo" evaluate logs/*/*/seed_0/checkpoints/policy.safetensors --episodes 2 \
        && "$bin/pogo" report
}

suite() { # NAME PYTHON RESOLUTION [PYTEST ARGUMENTS]
    local name=$1 python=$2 resolution=$3
    shift 3
    if [ -n "${ONLY:-}" ] && [ "$ONLY" != "$name" ]; then return; fi
    echo "== $name: $("$python" --version)"
    rm -rf "$folder/venv" "$folder/work"
    if "$python" -m venv --without-pip "$folder/venv" \
        && pip install --resolution "$resolution" -r pyproject.toml \
        && pip install --no-deps "$folder"/dist/*.whl \
        && (commands) \
        && pip install --resolution "$resolution" -r pyproject.toml --extra test \
        && if [ "$name" = nightly ]; then
            pip uninstall torchrl tensordict \
                && pip install --no-deps torchrl-nightly tensordict-nightly
        fi \
        && pip install --no-deps -e . \
        && "$folder/venv/bin/python" -m pytest -q "$@"; then
        echo "== $name: passed"
    else
        failed+=("$name")
    fi
}

suite lowest "$old" lowest-direct "$@"
suite highest "$new" highest "$@"
suite nightly "$new" highest "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
