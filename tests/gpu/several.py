"""The checks of `several.sh`, the most informative first."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.gpu.runner import Check, main

CHECKS = (
    Check("tp2", "layouts", "tensor_and_sequence_parallel", 130),  # with the run on one GPU, the first time
    Check("error", "layouts", "error_on_one_rank", 75),
    Check("vpp2", "layouts", "virtual_stages", 90),
    Check("dp2", "layouts", "data_parallel", 90),
    Check("pp2", "layouts", "pipeline_stages", 90),
    Check("killed", "layouts", "killed_rank", 75),
    Check("tp2pp2", "layouts", "tensor_parallel_stages", 90),  # of four GPUs
)

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:], CHECKS))
