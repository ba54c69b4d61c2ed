"""One rank of a run that a study measures: ``python -m megatron_sead.commands.scaling_rank CONFIG``, by torchrun."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megatron_sead.commands.cli import one_line_errors_on_ranks
from megatron_sead.config.run import load_config


def main() -> None:
    """Exit code 2, and one line, for a layout or setting that must change."""
    with one_line_errors_on_ranks():
        logging.disable(logging.WARNING)
        from megatron_sead.scaling.rank import measure

        measure(load_config(Path(sys.argv[1]), []))


if __name__ == "__main__":
    main()
