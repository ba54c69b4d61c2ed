#!/usr/bin/env bash
# SEAD at full size: the same run with a 32B student, Olmo-3.1-32B-Instruct-SFT.
# 4 nodes x 8 H100 80 GB; every number is explained in examples/configs/sead_32b.yaml.
#
#   bash examples/run_sead_32b.sh --dry-run         # no GPU: check everything, print bytes per rank
#   bash examples/run_sead_32b.sh --trace           # no GPU: and a step on fake CUDA tensors, memory and traffic by phase
#   SMALL=1 bash examples/run_sead_32b.sh           # every step of it at the size of the tiny pair, on two CPU cores
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash examples/run_sead_32b.sh      # and NODE_RANK=1, 2, 3 on the others
#
# It prepares the prompts, measures their difficulty, prints the plan, trains, and runs the benchmarks. What is done already
# is skipped: the same command goes on where it stopped. Arguments are passed on: key=value settings, --dry-run, --trace.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/full_size.sh
full_size sead-32b examples/configs/sead_32b.yaml "$@"
