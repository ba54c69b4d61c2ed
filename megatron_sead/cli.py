"""What every command shares: a user's mistake ends in one line on stderr and exit code 2, never in a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sead.errors import UserError


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
    """The same for commands that torchrun may have started: one line a node, whichever rank finds the mistake.

    The process ends at once, since its process groups may be waiting for ranks that are gone. An exception on another
    rank is then only an echo (a collective that lost its peer) and ends that rank quietly with code 2 as well.
    """
    try:
        yield
    except UserError as error:
        marker = _told_marker()
        if marker is None or _is_first(marker):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)
    except Exception:
        marker = _told_marker()
        if marker is not None:
            time.sleep(0.5)  # the echo may arrive while the other rank is still writing its line
            if marker.exists():
                os._exit(2)
        raise


def _told_marker() -> Path | None:
    """A file that says: a rank of this node has told the user. In the folder that torchrun makes for each attempt."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <attempt>/<local rank>/error.json
    return Path(error_file).parent.parent / "user_error" if error_file else None


def _is_first(marker: Path) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
