"""What the commands over checkpoints share: Megatron-Core on a CPU, and a progress bar."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def prepare_megatron() -> None:
    """Conversion is work for a CPU, where Megatron-Core cannot even be imported without this."""
    from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

    _reuse_freed_memory()
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # of what it would use for training
    adapt_to_cpu()


def _reuse_freed_memory() -> None:
    """Pieces are allocated in one thread and freed in another: the C library would give each back to the system, and
    the next one would cost a page fault every 4 KiB. C libraries without this setting are left as they are."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h's numbers
        for option, value in ((arena_max, 1), (mmap_threshold, 2**25), (trim_threshold, 2**28)):
            set_option(option, value)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and the time that is left, on a terminal; nothing in a log file."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
