"""The six sums of a token that give both entropies and both divergences, in one pass over a vocabulary shard.

With x = z - max z for the student's logits z, and y likewise for the teacher's:

    A = Σeˣ   B = Σeʸ   C = Σeˣx   D = Σeʸy   E = Σeˣ(y-x)   F = Σeʸ(y-x)

A rank takes the maxima of its own columns, so that it reads the logits once, and moves its sums to the global maxima
afterwards. With δ = (own maximum) - (global maximum), for each model,

    A' = e^δx A   C' = e^δx (C + δx A)   E' = e^δx (E + (δy-δx) A)   and B', D', F' likewise with e^δy.

So a call needs one MAX all-reduce of two numbers a token and one SUM all-reduce of six, whenever it makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.kernels import row_kernels
from megatron_sead.distillation.kernels.formulas import accumulation_dtype, move_sums

# Shapes: n tokens; V columns on this rank, padding included; c of them real

MODELS = 2  # columns of `maxima` and `columns`: student, teacher
SUMS = 6  # columns of `sums`: A B C D E F


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns of the vocabulary."""

    first: int  # token id of the first column
    real: int  # columns that are tokens; those after them are padding
    group: ProcessGroup | None  # None where one rank holds all columns


@dataclass
class PartialSums:
    """Per token, over this rank's columns until `start_sums` adds those of the group."""

    maxima: torch.Tensor  # [n, 2]
    sums: torch.Tensor  # [n, 6], relative to the maxima
    columns: torch.Tensor | None  # [n, 2] int64: token ids of the maxima, the lowest of equals

    @staticmethod
    def empty(tokens: int, dtype: torch.dtype, device: torch.device, *, with_columns: bool) -> PartialSums:
        """Of no columns at all."""
        columns = torch.zeros(tokens, MODELS, dtype=torch.int64, device=device) if with_columns else None
        return PartialSums(
            torch.full((tokens, MODELS), -torch.inf, dtype=dtype, device=device),
            torch.zeros(tokens, SUMS, dtype=dtype, device=device),
            columns,
        )

    def store(self, tokens: torch.Tensor, part: PartialSums) -> None:
        """Put a part in its place: that of the tokens with these indices."""
        self.maxima[tokens], self.sums[tokens] = part.maxima, part.sums
        if self.columns is not None and part.columns is not None:
            self.columns[tokens] = part.columns


def vocabulary_shard(width: int, group: ProcessGroup | None, vocab_size: int | None) -> VocabularyShard:
    """Which of this rank's `width` columns are tokens.

    Raises:
        ValueError: vocab_size is not within the columns of all ranks.
    """
    size = 1 if group is None else dist.get_world_size(group)
    first = 0 if group is None else width * dist.get_rank(group)
    group = None if size == 1 else group
    if vocab_size is None:
        return VocabularyShard(first, width, group)
    if not 0 < vocab_size <= width * size:
        raise ValueError(f"vocab_size={vocab_size}: must be from 1 to {width * size}, {size} shards of {width} columns")
    return VocabularyShard(first, min(width, max(0, vocab_size - first)), group)


def matrices(*tensors: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """[..., V] tensors of one shape as matrices [n, V], with their place among the flattened tokens.

    Views, never copies: where a tensor cannot be flattened in place, its first dimension is walked.
    """

    def walk(start: int, parts: tuple[torch.Tensor, ...]) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
        try:
            flat = tuple(part.view(-1, part.shape[-1]) for part in parts)
        except RuntimeError:
            step = parts[0][0].numel() // parts[0].shape[-1]
            for index in range(parts[0].shape[0]):
                yield from walk(start + index * step, tuple(part[index] for part in parts))
            return
        yield slice(start, start + len(flat[0])), flat

    if tensors[0].numel() > 0:
        yield from walk(0, tensors)


def pair_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    shard: VocabularyShard,
    *,
    needed: torch.Tensor | None = None,
    with_columns: bool = False,
) -> PartialSums:
    """The six sums of logits [..., V] over this rank's real columns. No collective.

    Args:
        needed: [n] bool; the other tokens' logits are not read, and their sums are zero.
        with_columns: find the maxima's token ids too.
    """
    tokens, device = student.shape[:-1].numel(), student.device
    result = PartialSums.empty(tokens, accumulation_dtype(student.dtype), device, with_columns=with_columns)
    if shard.real == 0:
        return result
    for place, (z, w) in matrices(student, teacher):
        rows = torch.arange(len(z), device=device) if needed is None else needed[place].nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        kernels = row_kernels(len(rows), shard.real, z, w)
        maxima, sums, columns = kernels.pair_sums(z, w, rows, shard.real, with_columns=with_columns)
        columns = None if columns is None else columns + shard.first
        result.store(rows + place.start, PartialSums(maxima, sums, columns))
    return result


def single_sums(logits: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [n, 1] and the sums A, C [n, 2] of one model's logits [..., V], for its entropy alone. No collective."""
    tokens, dtype = logits.shape[:-1].numel(), accumulation_dtype(logits.dtype)
    maxima = torch.full((tokens, 1), -torch.inf, dtype=dtype, device=logits.device)
    sums = torch.zeros(tokens, 2, dtype=dtype, device=logits.device)
    if shard.real > 0:
        for place, (rows,) in matrices(logits):
            kernels = row_kernels(len(rows), shard.real, rows)
            maxima[place], sums[place] = kernels.single_sums(rows, shard.real)
    return maxima, sums


def start_maxima(part: PartialSums, group: ProcessGroup | None) -> Callable[[], PartialSums]:
    """Start the first collective. Call what it returns to wait for global maxima, with their columns.

    The sums stay this rank's, moved to those maxima. Whoever waits late does other work meanwhile.
    """
    if group is None or len(part.maxima) == 0:
        return lambda: part
    keys = part.maxima.clone() if part.columns is None else _keys(part.maxima, part.columns)
    work = dist.all_reduce(keys, dist.ReduceOp.MAX, group=group, async_op=True)

    def finish() -> PartialSums:
        work.wait()
        maxima, columns = (keys, None) if part.columns is None else _from_keys(keys, part.maxima.dtype)
        return PartialSums(maxima, move_sums(part.sums, part.maxima, maxima), columns)

    return finish


def start_sums(part: PartialSums, group: ProcessGroup | None, *others: torch.Tensor) -> Callable[[], PartialSums]:
    """Start the second collective, of sums that are relative to the global maxima; call what it returns to wait.

    `others` [n, ...] ride along: they hold their sums over the ranks, too, once that call is back.
    """
    if group is None or len(part.sums) == 0:
        return lambda: part
    widths = [part.sums.shape[1], *(other.shape[1] for other in others)]
    together = torch.cat([part.sums, *others], dim=1)
    work = dist.all_reduce(together, group=group, async_op=True)

    def finish() -> PartialSums:
        work.wait()
        sums, *rest = together.split(widths, dim=1)
        for other, total in zip(others, rest, strict=True):
            other.copy_(total)
        return PartialSums(part.maxima, sums, part.columns)

    return finish


def reduce_over(part: PartialSums, group: ProcessGroup | None) -> PartialSums:
    """Maxima and sums over all ranks of the group. Two collectives."""
    return start_sums(start_maxima(part, group)(), group)()


def _keys(maxima: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """int64 whose maximum over ranks is the greatest maximum and, of equals, its lowest column.

    High half: the maximum's fp32 bits, made to sort as integers; low half: the column, counted down.
    """
    bits = (maxima.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: -0.0 equals 0.0
    return (_sortable(bits).long() << 32) | (0xFFFFFFFF - columns)


def _from_keys(keys: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    bits = _sortable((keys >> 32).int())
    return bits.view(torch.float32).to(dtype), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _sortable(bits: torch.Tensor) -> torch.Tensor:
    """fp32 bits as int32 <-> integers in the order of the numbers; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
