#!/usr/bin/env bash
# All checks and tests, in the same environment as the examples. Arguments are passed on to pytest: tests/run.sh -k zones
# MEGATRON_SEAD_DATA, if set, is a folder of data sets that some tests read; without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh

"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
"$VENV_PYTHON" -m pytest "$@"

# Second lane: the newer Megatron-Core, which declares Python 3.12 and runs on 3.11 too, over the same other packages.
# On Python 3.12 and later the first lane has it already.
python_version="$("$VENV_PYTHON" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')"
if [ "$python_version" = 3.11 ]; then
    lane="$VENV-mcore-0.19"
    if [ ! -f "$lane/.complete" ]; then
        "$VENV_PYTHON" -m venv "$lane" --without-pip
        "$VENV_PYTHON" -m pip --python "$lane/bin/python" install -qq --no-deps --ignore-requires-python megatron-core==0.19.2
        realpath "$VENV/lib/python3.11/site-packages" > "$lane/lib/python3.11/site-packages/base.pth"
        touch "$lane/.complete"
    fi
    "$lane/bin/python" -m pytest -m mcore_lane "$@" || { [ $? = 5 ] && [ $# -gt 0 ]; } # 5: the arguments select none of its tests
fi
