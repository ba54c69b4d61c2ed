"""What the commands that measure a model share: their ranks, what they write, and a way to stop and go on."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megatron_sead.commands.cli import one_line_errors, one_line_errors_on_ranks
from megatron_sead.errors import ArgumentError
from megatron_sead.files.durable import refused_by_the_disk
from megatron_sead.launch.ownership import sole_owner
from megatron_sead.launch.rank_failures import ending_together

if TYPE_CHECKING:
    from megatron_sead.evaluation.ranks import Ranks

RANKS_HELP = "start so many ranks on this machine, one a GPU; default: this process alone, or torchrun's ranks"


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """A user's mistake, whether this process is alone or one of several ranks."""
    with one_line_errors_on_ranks() if "RANK" in os.environ else one_line_errors():
        yield


@contextmanager
def measuring(device: str, output: Path, lock: Path, kept: Path) -> Iterator[Ranks]:
    """The ranks that measure, of which the first owns the output while the body runs.

    Args:
        lock: a file beside what is written.
        kept: where the answers are, which the same command continues from.
    """
    from megatron_sead.evaluation.ranks import joined_ranks

    warnings.filterwarnings("ignore", category=FutureWarning)  # what transformers tells its own authors
    try:
        with (
            refused_by_the_disk(lambda reason: ArgumentError("output", output, reason)),
            ending_together(),
            joined_ranks(device) as ranks,
            ExitStack() as stack,
        ):
            ranks.on_first(lambda: stack.enter_context(sole_owner(lock, f"--output={output}")))
            yield ranks
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from {kept}", file=sys.stderr)
        raise typer.Exit(130) from None
