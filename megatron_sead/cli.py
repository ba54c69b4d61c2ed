"""What every command shares: a user's mistake ends in one line on stderr and exit code 2, never in a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sead.errors import UserError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Commands of one process wrap their body in this; ``train`` has its own, which knows about ranks."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
