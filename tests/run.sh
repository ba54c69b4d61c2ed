#!/usr/bin/env bash
# All checks and tests, in the same environment as the examples. Arguments are passed on to pytest: tests/run.sh -k zones
# MEGATRON_SEAD_DATA, if set, is a folder of data sets that some tests read; without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh

# The other ends of what setup.py admits: transformers' oldest; and the newer Megatron-Core, which declares Python 3.12 and
# runs on 3.11 too (on 3.12 and later the first lane has it already)
other_versions() {
    "$@" transformers==5.16.1
    if "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        "$@" --no-deps --ignore-requires-python megatron-core==0.19.2
    fi
}

lane() { # NAME INSTALL MARKERS [pytest arguments]: the tests of these markers, in an environment over the first one
    local name="$1" markers="$3"
    overlay_environment "$name" "$2"
    shift 3
    "$VENV-$name/bin/python" -m pytest --numprocesses 2 --dist worksteal -m "$markers" "$@" ||
        { [ $? = 5 ] && [ $# -gt 0 ]; } # 5: the arguments select none of its tests
}

"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
"$VENV_PYTHON" -m pytest --numprocesses 2 --dist worksteal "$@"

lane other-versions other_versions "mcore_lane or transformers_lane" "$@"
if "$VENV_PYTHON" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")'; then
    lane vllm vllm_on_a_cpu vllm_lane "$@"
else
    echo "rollouts by vLLM are not tested here: its CPU build is for torch 2.13.0+cpu"
fi
