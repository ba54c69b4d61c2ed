"""Commands that start themselves again as the ranks of this machine."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from megatron_sead.errors import UserError


def start_ranks(count: int, module: str, arguments: list[str]) -> NoReturn:
    """Run a module as so many ranks, and end as they do.

    Raises:
        UserError: this process is a rank already.
    """
    from megatron_sead.launch.torchrun import main as launch

    if "RANK" in os.environ:
        raise UserError(f"--nproc-per-node {count}: this process is a rank already (RANK is set); leave the option out")
    sys.exit(launch(["--standalone", "--nproc-per-node", str(count), "-m", module, *arguments]))
