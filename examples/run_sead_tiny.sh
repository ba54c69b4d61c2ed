#!/usr/bin/env bash
# The whole job at a small size, on a CPU: a tiny OLMo-3 teacher, good at chains of single-digit arithmetic, teaches a
# student that is not. Two tensor-parallel ranks; at most ten minutes on two cores, set-up included.
#
#   bash examples/run_sead_tiny.sh                                    # -> runs/sead-tiny
#   OUTPUT=/tmp/opd bash examples/run_sead_tiny.sh policy.name=opd    # any setting of examples/configs/sead_tiny.yaml
#   NPROC=4 TP=2 PP=2 bash examples/run_sead_tiny.sh                  # ranks, tensor- and pipeline-parallel sizes
#
# The same command continues a run that was stopped. It ends with the accuracy before and after, the run directory,
# and its report.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh
source examples/launch.sh

OUTPUT="$(absolute "${OUTPUT:-}")"
NPROC="${NPROC:-2}"
launch examples/configs/sead_tiny.yaml \
    output="${OUTPUT:-runs/sead-tiny}" \
    parallel.tensor_model_parallel_size="${TP:-2}" \
    parallel.pipeline_model_parallel_size="${PP:-1}" \
    "$@"
