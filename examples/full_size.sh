# Sourced by the scripts of full-size runs: full_size NAME CONFIG [key=value ...] [--dry-run|--trace]: from released models and data to a
# table of benchmarks. A step whose output is there is skipped: the same command goes on where it stopped.
#
#   RELEASE      the prompts as they are released: a file, or a hub name
#   BENCHMARKS   folder with a folder for each benchmark, as math500/test.jsonl; default: the hub
#   SMALL=1      the same steps and settings with the tiny pair, on two CPU ranks, with vLLM's CPU build, in the folder OUTPUT
#
# On several nodes the first prepares and evaluates, the others wait for its files, which all must see.

if [ -z "${SMALL:-}" ] && nvidia-smi -L > /dev/null 2>&1; then
    EXTRAS=gpu
fi
source examples/setup_environment.sh
source examples/launch.sh
if [ -n "${SMALL:-}" ]; then
    overlay_environment vllm vllm_on_a_cpu
    VENV_PYTHON="$VENV-vllm/bin/python"
fi
NPROC="${NPROC:-8}"
NNODES="${NNODES:-4}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron orders communication by it

small_settings() { # PLACE: what a full-size run is at the size of the tiny pair, a setting a line
    printf '%s\n' output="$1/run" device=cpu training.precision=fp32 \
        student.path=examples/tiny/student teacher.path=examples/tiny/teacher \
        prompts.path="$1/prompts.jsonl" prompts.max_prompt_tokens=64 prompts.instruction= \
        parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=1 \
        training.steps=4 training.global_batch_size=16 training.micro_batch_tokens=208 training.lr=1e-3 training.lr_warmup_steps=0 \
        training.recompute_granularity=null checkpoints.interval=2 \
        rollouts.max_new_tokens=40 rollouts.tensor_parallel_size=2 rollouts.enforce_eager=true \
        rollouts.kv_cache_memory_bytes=67108864
}

values_of() { # CONFIG NAMES [key=value ...]: values of the run's settings whose NAMES are given, with blanks between; a line each
    "$VENV_PYTHON" -c 'import sys
from functools import reduce
from pathlib import Path
from megatron_sead.commands.cli import one_line_errors
from megatron_sead.config.run import load_config
with one_line_errors():
    config = load_config(Path(sys.argv[1]), sys.argv[3:])
    for name in sys.argv[2].split():
        print(reduce(getattr, name.split("."), config))' "$@"
}

wait_for() { # FILE: made by the first node
    until [ -e "$1" ]; do
        echo "waiting for the first node to write $1"
        sleep 15
    done
}

sead() {
    "$VENV_PYTHON" -m megatron_sead.commands.sead "$@"
}

full_size() {
    local name="$1" config="$2" place argument values output student teacher prompts longest prepared release benchmarks=() of_release=() choice=() small=()
    shift 2
    release="${RELEASE:-BytedTsinghua-SIA/DAPO-Math-17k}"
    of_release=(answer_field=reward_model.ground_truth drop_instruction=true)
    if [ -n "${SMALL:-}" ]; then
        place="$(absolute "${OUTPUT:-}")" && place="${place:-runs/$name-small}"
        mapfile -t small < <(small_settings "$place")
        set -- "${small[@]}" "$@"
        release="${RELEASE:-examples/tiny/prompts.jsonl}" of_release=()
        choice=(--benchmark heldout=examples/tiny/heldout.jsonl) benchmarks=(--benchmarks examples/tiny/heldout.jsonl)
        NPROC=2 NNODES=1
        mkdir -p "$place"
    fi
    for argument in "$@"; do
        if [ "$argument" = --dry-run ] || [ "$argument" = --trace ]; then
            launch "$config" "$@"
            return
        fi
    done
    if [ -n "${BENCHMARKS:-}" ]; then
        choice=(--data "$BENCHMARKS")
        benchmarks=(--benchmarks "$BENCHMARKS"/*/test.jsonl)
    fi
    values="$(values_of "$config" "output student.path teacher.path prompts.path prompts.max_prompt_tokens" "$@")" || return
    { read -r output && read -r student && read -r teacher && read -r prompts && read -r longest; } <<< "$values"

    if [ "${NODE_RANK:-0}" -gt 0 ]; then
        wait_for "$prompts" && launch "$config" "$@"
        return
    fi
    if [ ! -e "$prompts" ]; then
        prepared="${prompts%.jsonl}.prepared.jsonl"
        if [ ! -e "$prepared" ]; then
            echo "== prompts: $release -> $prepared"
            sead prepare --input "$release" --output "$prepared" --model "$student" \
                "${benchmarks[@]}" "${of_release[@]}" max_prompt_tokens="${longest/None/null}" || return
        fi
        echo "== difficulty of each prompt for the student -> $prompts"
        sead difficulty --config "$config" --output "$prompts" --nproc-per-node "$NPROC" -- "$@" prompts.path="$prepared" || return
    fi
    if [ ! -e "$output/summary.json" ]; then
        echo "== the plan"
        launch "$config" "$@" --dry-run || return
        echo "== training -> $output"
        launch "$config" "$@" || return
    fi
    echo "== benchmarks: before, after, and the teacher -> $output-benchmarks"
    sead evaluate --model before="$student" --model after="$output/student-hf" --model teacher="$teacher" "${choice[@]}" \
        --output "$output-benchmarks" --config "$config" --nproc-per-node "$NPROC" -- "$@"
}
