"""Seconds, bytes and collectives of a step."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sead.distillation import scratch

RESET = Path("/proc/self/clear_refs")
NOT_COLLECTIVES = ("wait_tensor", "barrier", "monitored_barrier_")


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one step, to its end on the device."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """By how much the step's peak exceeds what was live before it; None: this system does not tell.

    On a CPU that is resident memory, whoever asked for it: torch, a math library, a compiled kernel. The worker's
    environment makes malloc and MKL give back what they do not use, so that nothing hides in what was live before.
    """
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    try:
        RESET.write_text("5", encoding="ascii")
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


class CollectiveCount(TorchDispatchMode):
    """Counts what reaches torch's collectives inside the `with`, through whichever function it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation of torch passes here."""
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"):
            self.total += func._opname not in NOT_COLLECTIVES
        return func(*args, **(kwargs or {}))


def collectives(step: Callable[[], Any]) -> int:
    """Of one step on this rank. Compiled functions run eagerly meanwhile: their collectives are the same."""
    with torch.compiler.set_stance("force_eager"), CollectiveCount() as count:
        step()
    return count.total


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back() -> None:
    scratch.release()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
