"""One check: ``python -m tests.gpu.check MODULE NAME PLACE``. What it measures is in the file PLACE at once."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Report:
    """Numbers and expectations of a check, written whenever one is added: what was measured survives the process."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.numbers: dict[str, Any] = {}
        self.expected: dict[str, str] = {}
        self.ok = True
        self.error: str | None = None

    @property
    def folder(self) -> Path:
        """Where a check may leave a file."""
        return self._place.parent

    def add(self, **numbers: Any) -> None:
        self.numbers |= {name: round_off(value) for name, value in numbers.items()}
        self.write()

    def expect(self, name: str, holds: bool, what: str) -> None:
        """`what` is expected, in words; the check fails where it does not hold."""
        self.expected[name] = f"{'yes' if holds else 'no'}: {name}: {what}"
        self.ok = self.ok and bool(holds)
        self.write()

    def attempt(self, name: str, part: Callable[[], Any]) -> None:
        """A part whose failure does not stop the next."""
        try:
            part()
        except Exception as error:
            self.ok = False
            self.expected[name] = f"no: {name}: raised {type(error).__name__}"
            self.numbers[f"{name} error"] = str(error)[-600:]
            traceback.print_exc()
            self.write()
        if CUDA:
            torch.cuda.empty_cache()

    def write(self) -> None:
        content = {"ok": self.ok, "numbers": self.numbers, "expected": self.expected, "error": self.error}
        self._place.write_text(json.dumps(content), encoding="utf-8")


def round_off(value: Any) -> Any:
    """Four digits are enough to read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: round_off(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_off(item) for item in value]
    return value


def seconds(work: Callable[[], Any], *, warm_up: int = 2, repeats: int = 5) -> float:
    """Median time of a call, by the device's own events on a GPU."""
    for _ in range(warm_up):
        work()
    return statistics.median(once(work) for _ in range(repeats))


def once(work: Callable[[], Any]) -> float:
    """Time of a single call."""
    if not CUDA:
        import time

        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, on the device."""
    expected = expected.to(DEVICE).double()
    return float((found.to(DEVICE).double() - expected).norm() / expected.norm())


def copy_rate(size: int = 2**32 if CUDA else 2**26) -> float:
    """Bytes a second, read and written."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source))


def peak(work: Callable[[], Any]) -> int:
    """Bytes of the device that a call needs beside what is there before it."""
    if not CUDA:
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(module: str, name: str, place: Path) -> None:
    report = Report(place)
    report.write()
    try:
        getattr(importlib.import_module(f"tests.gpu.{module}"), name)(report)
    except Exception:
        traceback.print_exc()
        report.ok = False
        report.error = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
    report.write()


if __name__ == "__main__":
    # the module that the checks import is tests.gpu.check, not this one that runs as __main__
    importlib.import_module("tests.gpu.check").main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
