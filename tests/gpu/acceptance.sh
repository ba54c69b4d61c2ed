#!/usr/bin/env bash
# What a first GPU should answer, in at most eight minutes: a JSON line a check as it ends, then a table.
#   bash tests/gpu/acceptance.sh OUTPUT [CHECK ...]     on a GPU; with small sizes where there is none; OUTPUT: a new or empty folder
set -u
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.runner "$@"
