#!/usr/bin/env bash
# SEAD at full size: the same run with a 32B student, Olmo-3.1-32B-Instruct-SFT.
# 4 nodes x 8 H100 80 GB; every number is explained in examples/configs/sead_32b.yaml.
#
#   bash examples/run_sead_32b.sh --dry-run         # anywhere, no GPU: check everything, print bytes per rank
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash examples/run_sead_32b.sh      # and NODE_RANK=1, 2, 3 on the others
#
# Arguments are passed on: key=value settings, --dry-run.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh
source examples/launch.sh

NPROC="${NPROC:-8}"
NNODES="${NNODES:-4}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron orders communication by it
launch examples/configs/sead_32b.yaml "$@"
