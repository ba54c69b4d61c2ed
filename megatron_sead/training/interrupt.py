"""Lets Ctrl-C, a scheduler's SIGTERM and a closing terminal end a run after the current step, on every rank alike."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class InterruptFlag:
    """Remembers a signal, once it listens. Ranks see it at different moments, so they agree on it once a step."""

    def __init__(self) -> None:
        self._raised = False
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Remember signals from here on, instead of ending the process.

        Every rank must call it at the same point, after a collective: a rank that a signal ends before it listens would
        leave the others waiting.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def agreed(self, control: dist.ProcessGroup) -> bool:
        """Collective over `control` (a gloo group): has any rank been asked to stop?"""
        raised = torch.tensor(int(self._raised))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=control)
        return bool(raised)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
