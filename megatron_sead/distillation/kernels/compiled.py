"""The kernels on a CPU with a C++ compiler: each formula one fused, vectorised loop over all rows, from torch.compile.

Compiled once for each type, for rows that follow each other and for rows cut from wider ones; neither the number of
rows nor that of columns compiles again, and inductor keeps the result on disk for the next process. The first call of
a process takes some seconds, so only large blocks come here: it is the size of a call that decides, never its turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_sead.distillation.kernels import eager, formulas

log = logging.getLogger(__name__)

# Shapes as in `eager`

LEAST_ELEMENTS = 2**22  # rows * columns: some 30 ms of eager work
LEAST_COLUMNS = 4097  # inductor sums shorter rows in another way, and would compile for them once more
MOST_VARIANTS = 32  # of a kernel: types, layouts, gradient in place or not; torch's own limit is 8

_variants: set[tuple[Any, ...]] = set()  # that this process has compiled
_failed = False  # the compiler is missing or broken: said once, then eager for the rest of the process


def is_worth_compiling(logits: torch.Tensor, rows: int, real: int) -> bool:
    """Is a call over so many rows of `logits` [n, V] served here?"""
    return (
        not _failed
        and logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits.stride(-1) == 1
        and rows > 1  # torch.compile compiles anew for a size of one
        and rows * real >= LEAST_ELEMENTS
        and real >= LEAST_COLUMNS
        and not torch._dynamo.config.disable
    )


def pair_sums(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, real: int, *, with_columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    kernel = _pair_sums_with_columns if with_columns else _pair_sums
    result = _run(kernel, student[:, :real], teacher[:, :real], rows)
    if result is None:
        return eager.pair_sums(student, teacher, rows, real, with_columns=with_columns)
    maxima, sums, *columns = result
    return maxima, sums, columns[0] if columns else None


def single_sums(logits: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    result = _run(_single_sums, logits[:, :real])
    return eager.single_sums(logits, real) if result is None else result


def write_gradient(
    out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor, real: int
) -> None:
    arguments = out[:, :real], student[:, :real], teacher[:, :real], coefficients
    if _run(_write_gradient, *arguments) is None:
        eager.write_gradient(out, student, teacher, coefficients, real)


def _run(kernel: Callable[..., Any], *arguments: torch.Tensor) -> Any:
    """What the compiled kernel returns; None, before anything is written, where it cannot be compiled."""
    global _failed
    if _failed:
        return None
    try:
        variant = (kernel, len({id(argument) for argument in arguments}), *map(_layout, arguments))
        if variant in _variants:
            return kernel(*arguments)
        _variants.add(variant)
        with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS):  # takes a millisecond itself
            return kernel(*arguments)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        _failed = True
        reason = str(error).strip().splitlines()[0]
        log.warning("torch.compile failed, so the loss runs three to four times slower, eagerly: %s", reason)
        return None


def _layout(argument: torch.Tensor) -> tuple[torch.dtype, bool]:
    return argument.dtype, argument.is_contiguous()


@torch.compile(dynamic=True, fullgraph=True)
def _pair_sums(student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return formulas.pair_sums(student[rows], teacher[rows])


@torch.compile(dynamic=True, fullgraph=True)
def _pair_sums_with_columns(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, w = student[rows], teacher[rows]
    maxima, sums = formulas.pair_sums(z, w)
    columns = [formulas.columns_of(z, maxima[:, :1]), formulas.columns_of(w, maxima[:, 1:])]
    return maxima, sums, torch.stack(columns, dim=-1)


@torch.compile(dynamic=True, fullgraph=True)
def _single_sums(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return formulas.single_sums(logits)


@torch.compile(dynamic=True, fullgraph=True)
def _write_gradient(out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor) -> int:
    out.copy_(formulas.gradient(student, teacher, coefficients))
    return 0
