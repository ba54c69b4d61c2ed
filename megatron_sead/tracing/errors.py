"""What a trace finds that a run on GPUs would fail with, or be silently wrong by."""

from __future__ import annotations


class WrongCollective(RuntimeError):
    """A collective that ranks of a real run could not take part in, or whose tensors are used while it runs."""


class WrongDevice(RuntimeError):
    """Tensors of several devices, where an operation wants them on one."""
