"""Stand-ins for CUDA's streams and events where no kernel runs beside the host's code: nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class IdleStream:
    """Of the CPU, where work is done when the call returns."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> IdleEvent:
        return event if event is not None else IdleEvent()

    def __enter__(self) -> IdleStream:
        return self

    def __exit__(self, *exc: Any) -> None: ...


class IdleEvent:
    """Of an `IdleStream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def always(value: Any) -> Callable[..., Any]:
    """A function that does nothing and returns `value`: a new one each time, since torch.compile tells
    torch's functions apart by identity and refuses two names for one."""
    return lambda *args, **kwargs: value
