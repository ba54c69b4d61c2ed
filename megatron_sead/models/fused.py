"""Elementwise work that a GPU does in one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def fused_on_gpu(function: FunctionT) -> FunctionT:
    """A function of tensors that torch compiles where its first argument is on a GPU, and runs as it is elsewhere.

    What it computes in fp32 between its bf16 input and output then stays in registers. Sizes that change from call to
    call are compiled once more, as variables.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return (compiled() if first.is_cuda else function)(first, *rest, **options)

    return cast(FunctionT, call)
