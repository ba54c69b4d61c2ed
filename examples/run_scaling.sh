#!/usr/bin/env bash
# Layouts of the tiny pair beside each other, on a CPU: speed, memory, traffic and curves on the same rollouts, as tables
# and plots. Four minutes on two idle cores.
#
#   bash examples/run_scaling.sh                                       # -> runs/scaling-tiny/scaling.md
#   OUTPUT=/tmp/scaling bash examples/run_scaling.sh steps=10          # any setting of the study
#   STUDY=my.yaml OUTPUT=runs/mine bash examples/run_scaling.sh        # your own: one GPU a rank, if its config says device: cuda
#
# The same command continues a study that was stopped. examples/slurm/scaling.sbatch is for many nodes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_environment.sh
source examples/launch.sh

OUTPUT="$(absolute "${OUTPUT:-}")"
STUDY="$(absolute "${STUDY:-}")"
"$VENV_PYTHON" tools/scaling.py run --study "${STUDY:-examples/scaling/tiny.yaml}" --output "${OUTPUT:-runs/scaling-tiny}" "$@"
