#!/usr/bin/env bash
# A few steps on GSM8K with the OLMo tokenizer and random tiny models, on a CPU: it runs, and teaches nothing.
#
#   TOKENIZER=DIR_OR_JSON bash examples/run_sead_gsm8k.sh                            # GSM8K from the hub
#   TOKENIZER=... PROMPTS=gsm8k/train.jsonl bash examples/run_sead_gsm8k.sh          # or from a file
#
# With MEGATRON_SEAD_DATA set, both default to that folder's gsm8k/train.jsonl and tokenizer_dolma2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh
source examples/launch.sh

DATA="${MEGATRON_SEAD_DATA:-}"
PROMPTS="$(absolute "${PROMPTS:-${DATA:+$DATA/gsm8k/train.jsonl}}")"
TOKENIZER="$(absolute "${TOKENIZER:-${DATA:+$DATA/tokenizer_dolma2/allenai_dolma2.json}}")"
PAIR="$(absolute "${PAIR:-$PWD/runs/gsm8k-pair}")"
OUTPUT="$(absolute "${OUTPUT:-$PWD/runs/gsm8k-smoke}")"
NPROC="${NPROC:-2}"

if [ ! -d "$PAIR/student" ]; then
    "$VENV_PYTHON" tools/make_tiny_pair.py --random --context 2048 --output "$PAIR" \
        --tokenizer "${TOKENIZER:?set TOKENIZER to a directory or JSON file of the OLMo tokenizer}"
fi
launch examples/configs/gsm8k_smoke.yaml output="$OUTPUT" student.path="$PAIR/student" teacher.path="$PAIR/teacher" \
    ${PROMPTS:+prompts.path="$PROMPTS"} "$@"
