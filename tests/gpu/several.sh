#!/usr/bin/env bash
# What a first machine with two or more GPUs should answer, in at most eight minutes: a JSON line a check as it ends, then
# a table. Layouts of the tiny pair over NCCL against one GPU, and what becomes of the ranks when one of them fails.
#   bash tests/gpu/several.sh OUTPUT [CHECK ...]     over gloo where there is no GPU; OUTPUT: a new or empty folder
set -u
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.several "$@"
