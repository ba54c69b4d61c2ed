"""``sead launch``: torchrun, with its arguments, that leaves the telling of failures to the ranks."""

from __future__ import annotations

import sys


def app(arguments: list[str], prog_name: str) -> None:
    """Start the ranks, and exit as they did."""
    from megatron_sead.launch.torchrun import main  # imports torch

    sys.exit(main(arguments))
