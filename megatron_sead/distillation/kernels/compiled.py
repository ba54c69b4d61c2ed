"""The kernels on a CPU with a C++ compiler: each formula one fused, vectorised loop over all rows, from torch.compile.

Compiled once for each type, for rows that follow each other and for rows cut from wider ones; neither the number of
rows nor that of columns compiles again, and inductor keeps the result on disk for the next process. The first call of
a process takes some seconds, so only large blocks come here: it is the size of a call that decides, never its turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_sead.distillation.kernels import eager, formulas

log = logging.getLogger(__name__)

# Shapes as in `eager`

LEAST_ELEMENTS = 2**22  # rows * columns: some 30 ms of eager work
FOLDS = 4  # equal parts of a row that are added up side by side
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
    folded = real - real % FOLDS
    result = _run(_pair_sums, _folds(student, folded), _folds(teacher, folded), rows)
    if result is None:
        return eager.pair_sums(student, teacher, rows, real, with_columns=with_columns)
    maxima, sums = result
    if folded < real:  # the last columns, as if of another shard
        own, more = result, eager.pair_sums(student[:, folded:], teacher[:, folded:], rows, real - folded)
        maxima = torch.maximum(own[0], more[0])
        sums = sum(formulas.move_sums(part, of, maxima) for of, part, *_ in (own, more))
    if not with_columns:
        return maxima, sums, None
    pair = [_columns_of(logits[:, :real], rows, maxima[:, i]) for i, logits in enumerate((student, teacher))]
    return maxima, sums, torch.stack(pair, dim=-1)


def _columns_of(logits: torch.Tensor, rows: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """[k] where the maxima [k] of the rows are. A pass of its own: within the other, inductor would store the rows."""
    result = _run(_columns, logits, rows, maxima)
    return eager.columns_of(logits, rows, maxima) if result is None else result


def single_sums(logits: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    folded = real - real % FOLDS
    result = _run(_single_sums, _folds(logits, folded))
    if result is None:
        return eager.single_sums(logits, real)
    maxima, sums = result
    if folded < real:
        own, more = result, eager.single_sums(logits[:, folded:], real - folded)
        maxima = torch.maximum(own[0], more[0])
        sums = sum(formulas.move_single_sums(part, of, maxima) for of, part in (own, more))
    return maxima, sums


def write_gradient(
    out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor, real: int
) -> None:
    result = out[:, :real]
    # where the gradient is written over the logits they are one tensor for the compiler, so that it has no alias to
    # untangle; a teacher in the same memory would make it store what it reads before it writes
    z = result if _share_memory(out, student) else student[:, :real]
    if _share_memory(out, teacher) or _run(_write_gradient, result, z, teacher[:, :real], coefficients) is None:
        eager.write_gradient(out, student, teacher, coefficients, real)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


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


def _folds(logits: torch.Tensor, columns: int) -> torch.Tensor:
    """[n, FOLDS, columns / FOLDS] a view."""
    return logits[:, :columns].unflatten(1, (FOLDS, -1))


@torch.compile(dynamic=True, fullgraph=True)
def _pair_sums(student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _sums_of_folds(student[rows], teacher[rows])


@torch.compile(dynamic=True, fullgraph=True)
def _columns(logits: torch.Tensor, rows: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    return formulas.columns_of(logits[rows], maxima[:, None])


@torch.compile(dynamic=True, fullgraph=True)
def _single_sums(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, maximum = formulas.center(logits, (-2, -1))
    return maximum.squeeze(1), _add_folds(formulas.single_terms(x[:, fold]) for fold in range(FOLDS))


def _sums_of_folds(z: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [r, 2] and the six sums [r, 6] of logits [r, FOLDS, c / FOLDS]."""
    (x, student_maximum), (y, teacher_maximum) = formulas.center(z, (-2, -1)), formulas.center(w, (-2, -1))
    sums = _add_folds(formulas.pair_terms(x[:, fold], y[:, fold]) for fold in range(FOLDS))
    return torch.cat([student_maximum, teacher_maximum], dim=-1).squeeze(1), sums


def _add_folds(terms: Iterable[list[torch.Tensor]]) -> torch.Tensor:
    """[r, terms] sums of each fold's terms [r, c / FOLDS]: over folds in fp32, then along them in fp64.

    The compiled loop adds up a lane's terms one after another, and over 100k columns fp32 would lose two digits so. The
    folds pay for fp64, in which one number of four is added.
    """
    added = [sum(of_folds[1:], of_folds[0]) for of_folds in zip(*terms, strict=True)]
    return torch.stack([term.double().sum(-1).float() for term in added], dim=-1)


@torch.compile(dynamic=True, fullgraph=True)
def _write_gradient(out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor) -> int:
    out.copy_(formulas.gradient(student, teacher, coefficients))
    return 0
