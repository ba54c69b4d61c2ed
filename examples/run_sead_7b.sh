#!/usr/bin/env bash
# SEAD at full size: Olmo-3-7B-Instruct learns math from Olmo-3.1-32B-Instruct, the paper's run.
# 4 nodes x 8 H100 80 GB; every number is explained in examples/configs/sead_7b.yaml.
#
#   bash examples/run_sead_7b.sh --dry-run         # anywhere, no GPU: check everything, print bytes per rank
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash examples/run_sead_7b.sh      # and NODE_RANK=1, 2, 3 on the others
#
# Arguments are passed on: key=value settings, --dry-run.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh
source examples/launch.sh

NPROC="${NPROC:-8}"
NNODES="${NNODES:-4}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron orders communication by it
launch examples/configs/sead_7b.yaml "$@"
