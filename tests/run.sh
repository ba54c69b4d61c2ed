#!/usr/bin/env bash
# All checks and tests, in the same environment as the examples. Arguments are passed on to pytest: tests/run.sh -k zones
# MEGATRON_SEAD_DATA, if set, is a folder of data sets that some tests read; without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh

"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
"$VENV_PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"

# Second lane: the other ends of what setup.py admits, over the same other packages. transformers' oldest; and the newer
# Megatron-Core, which declares Python 3.12 and runs on 3.11 too (on 3.12 and later the first lane has it already).
lane="$VENV-other-versions"
if [ ! -f "$lane/.complete" ]; then
    packages="$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$VENV_PYTHON" -m venv "$lane" --without-pip
    echo "$packages" > "$("$lane/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    "$VENV_PYTHON" -m pip --python "$lane/bin/python" install -qq transformers==5.16.1
    if [[ "$packages" == */python3.11/* ]]; then
        "$VENV_PYTHON" -m pip --python "$lane/bin/python" install -qq --no-deps --ignore-requires-python megatron-core==0.19.2
    fi
    touch "$lane/.complete"
fi
"$lane/bin/python" -m pytest --numprocesses 2 --dist loadfile -m "mcore_lane or transformers_lane" "$@" || { [ $? = 5 ] && [ $# -gt 0 ]; } # 5: the arguments select none of its tests
