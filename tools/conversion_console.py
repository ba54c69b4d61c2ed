"""What the commands over checkpoints share: Megatron-Core on a CPU, and a progress bar."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def prepare_megatron() -> None:
    """Conversion is work for a CPU, where Megatron-Core cannot even be imported without this."""
    from megatron_sead.training.cpu_adaptor import adapt_to_cpu

    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # of what it would use for training
    adapt_to_cpu()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and the time that is left, on a terminal; nothing in a log file."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
