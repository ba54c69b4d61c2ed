"""Wall time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class PhaseTimer:
    """Measures phases, which may contain others."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body is the phase `name`."""
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def part(self, name: str) -> AbstractContextManager[None]:
        """The body is a part of a phase. Not measured here: on a GPU it may only ask for work that is done later."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """``NAME_seconds`` of each phase that has ended."""
        return {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
