#!/usr/bin/env bash
# The suite on the oldest and the newest versions that are supported, and on TorchRL's nightly build:
#
#     tests/versions.sh [PYTEST ARGUMENTS]
#
# Makes one virtual environment after the other in a temporary folder, some GB each. Needs
# python3.10 and python3.12 (PYTHON_OLD, PYTHON_NEW name others, such as python3.13); ONLY=nightly runs one of them.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
old=${PYTHON_OLD:-python3.10} new=${PYTHON_NEW:-python3.12}
failed=()

suite() { # NAME PYTHON TORCH [PYTEST ARGUMENTS]
    local name=$1 python=$2 torch=$3 venv
    shift 3
    if [ -n "${ONLY:-}" ] && [ "$ONLY" != "$name" ]; then return; fi
    echo "== $name: $("$python" --version), torch $torch"
    venv=$(mktemp -d)
    if "$python" -m venv "$venv" \
        && "$venv/bin/pip" install -q --upgrade pip \
        && "$venv/bin/pip" install -q -e ".[test]" "torch==$torch" "${releases[@]}" \
        && if [ "$name" = nightly ]; then
            "$venv/bin/pip" uninstall -q -y torchrl tensordict \
                && "$venv/bin/pip" install -q --no-deps torchrl-nightly tensordict-nightly
        fi \
        && "$venv/bin/python" -m pytest -q "$@"; then
        echo "== $name: passed"
    else
        failed+=("$name")
    fi
    rm -rf "$venv"
}

releases=(torchrl==0.14.1 tensordict==0.14.3)
suite lowest "$old" 2.11.0 "$@"
suite highest "$new" 2.14.1 "$@"
suite nightly "$new" 2.14.1 "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
