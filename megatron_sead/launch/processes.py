"""Which process is it, and does it still live? Its number alone does not say: numbers are given out again."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

PROC = Path("/proc/self/stat")
PR_SET_PDEATHSIG = 1  # of Linux: the signal that the kernel sends a process when its parent ends
WATCH = "parent"  # the thread's name
END_WITH_PARENT = "MEGATRON_SEAD_END_WITH_PARENT"  # variable for a launcher that another program of ours waits for


def started(pid: int) -> float | None:
    """When a process began, in a unit that only this function knows; None if there is no such process, or a zombie."""
    try:
        if PROC.exists():  # in ticks since the machine's start: no clock that is set can move it
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            return None if fields[0] in "ZX" else float(fields[19])
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (OSError, psutil.Error):
        return None


def end_with_parent() -> None:
    """From here on this process ends when its parent does, however that ended, and so do processes forked from it.

    For ranks: their launcher can be killed in a way that leaves it no time to end them, and the same command would then
    start a second run beside them. Linux's kernel does it; the thread is for other systems, and for a parent that was
    gone before the kernel was asked.
    """
    if any(thread.name == WATCH for thread in threading.enumerate()):
        return
    parent = os.getppid()
    _ask_kernel()
    os.register_at_fork(after_in_child=_ask_kernel)  # Megatron forks processes that write checkpoints
    threading.Thread(target=_end_without, args=(parent,), name=WATCH, daemon=True).start()


def _ask_kernel() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
