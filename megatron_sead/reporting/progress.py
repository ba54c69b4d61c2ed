"""What a person watching the run sees: a bar on a terminal, lines in a log file."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = (
    ("loss", "loss {:.4f}"),
    ("pass_rate", "pass rate {:.2f}"),
    ("eligible_difficulty", "open difficulty {:.2f}"),  # a gate that opens to harder prompts lowers the pass rate
    ("alpha", "alpha {:.2f}"),
    ("student_entropy", "entropy {:.2f}"),
    ("tokens_per_second", "{:.0f} tok/s"),
)


class StepProgress:
    """Shows each finished step with its metrics, and how many steps are done. Steps have the numbers of metrics.jsonl,
    from 0.

    Use it as a context manager; only one rank is `enabled`.

    Args:
        total: steps of the whole run.
        done: steps that an earlier start of the run has done.
    """

    LOG_LINES = 20  # lines a run leaves in a log file, where no bar can be drawn

    def __init__(self, console: Console, *, total: int, done: int, enabled: bool) -> None:
        self._console = console
        self._total = total
        self._done = done
        self._bar: Progress | None = None
        self._enabled = enabled
        if enabled and console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                TextColumn("done"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, metrics: dict[str, Any]) -> None:
        """One step is done."""
        self._done += 1
        text = f"step {metrics['step']}" + (" (skipped): " if metrics.get("skipped") else ": ")
        text += ", ".join(form.format(metrics[key]) for key, form in SHOWN if metrics.get(key) is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        elif self._enabled and (self._done % max(1, self._total // self.LOG_LINES) == 0 or self._done == self._total):
            self._console.print(f"{self._done}/{self._total} done, {text}", highlight=False, soft_wrap=True)
