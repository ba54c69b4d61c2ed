"""What every command shares: a user's mistake ends in one line on stderr and exit code 2, never in a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sead.errors import UserError
from megatron_sead.processes import end_with_parent
from megatron_sead.rank_failures import fail


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Commands of one process run their body in this."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def one_line_errors_on_ranks() -> Iterator[None]:
    """The same for commands that torchrun may have started: all ranks end, and the first error is told once.

    A mistake in one line, with exit code 2; anything else with its traceback, and exit code 1. Ranks that torchrun
    started end when it does.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        yield
    except UserError as error:
        fail(2, f"error: {error}", error)
    except Exception as error:
        rank = os.environ.get("RANK")
        fail(1, (f"rank {rank} failed:\n" if rank else "") + traceback.format_exc().rstrip(), error)
