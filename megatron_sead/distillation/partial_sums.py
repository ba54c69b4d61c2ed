"""The six sums of a token that give both entropies and both divergences, in one pass over a vocabulary shard.

With x = z - max z for the student's logits z, and y likewise for the teacher's:

    A = Σeˣ   B = Σeʸ   C = Σeˣx   D = Σeʸy   E = Σeˣ(y-x)   F = Σeʸ(y-x)

A rank takes the maxima of its own columns, so that it reads the logits once, and moves its sums to the global maxima
afterwards. With δ = (own maximum) - (global maximum), for each model,

    A' = e^δx A   C' = e^δx (C + δx A)   E' = e^δx (E + (δy-δx) A)   and B', D', F' likewise with e^δy.

So a call needs one MAX all-reduce of two numbers a token and one SUM all-reduce of six, whenever it makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# Shapes: n tokens; V columns on this rank, padding included; c of them real; r rows of a block

MODELS = 2  # columns of `maxima` and `columns`: student, teacher
SUMS = 6  # columns of `sums`: A B C D E F


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns of the vocabulary."""

    first: int  # token id of the first column
    real: int  # columns that are tokens; those after them are padding
    group: ProcessGroup | None


@dataclass
class PartialSums:
    """Per token, over this rank's columns until `reduce_over` the group."""

    maxima: torch.Tensor  # [n, 2]
    sums: torch.Tensor  # [n, 6], relative to the maxima
    columns: torch.Tensor | None  # [n, 2] int64: token ids of the maxima, the lowest of equals
    has_masks: bool  # some of this rank's logits are -inf: 0 * inf must be kept out

    @staticmethod
    def empty(tokens: int, dtype: torch.dtype, device: torch.device, *, with_columns: bool) -> PartialSums:
        """Of no columns at all."""
        columns = torch.zeros(tokens, MODELS, dtype=torch.int64, device=device) if with_columns else None
        return PartialSums(
            torch.full((tokens, MODELS), -torch.inf, dtype=dtype, device=device),
            torch.zeros(tokens, SUMS, dtype=dtype, device=device),
            columns,
            has_masks=False,
        )

    def store(self, place: slice, part: PartialSums) -> None:
        """Put a part of the tokens in its place."""
        self.maxima[place], self.sums[place] = part.maxima, part.sums
        if self.columns is not None and part.columns is not None:
            self.columns[place] = part.columns
        self.has_masks |= part.has_masks


def vocabulary_shard(width: int, group: ProcessGroup | None, vocab_size: int | None) -> VocabularyShard:
    """Which of this rank's `width` columns are tokens.

    Raises:
        ValueError: vocab_size is not within the columns of all ranks.
    """
    size = 1 if group is None else dist.get_world_size(group)
    first = 0 if group is None else width * dist.get_rank(group)
    if vocab_size is None:
        return VocabularyShard(first, width, group)
    if not 0 < vocab_size <= width * size:
        raise ValueError(f"vocab_size={vocab_size}: must be from 1 to {width * size}, {size} shards of {width} columns")
    return VocabularyShard(first, min(width, max(0, vocab_size - first)), group)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Rows of [..., V] tensors of one shape, `size` at a time, with their place among the flattened tokens.

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
        for row in range(0, len(flat[0]), size):
            rows = tuple(part[row : row + size] for part in flat)
            yield slice(start + row, start + row + len(rows[0])), rows

    if tensors[0].numel() > 0:
        yield from walk(0, tensors)


def block_rows(columns: int, device: torch.device) -> int:
    """Rows of a block whose scratch stays in a core's cache; elsewhere, rows enough to keep the device busy."""
    elements = 2**17 if device.type == "cpu" else 2**24
    return max(1, elements // max(1, columns))


def scratch_buffers(count: int, rows: int, columns: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`count` buffers [rows, columns] in the accumulation type, allocated once a call."""
    return torch.empty(count, rows, columns, dtype=accumulation_dtype(like.dtype), device=like.device).unbind()


def row_argmax(rows: torch.Tensor, block: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """[r] maximum of each row and its first column.

    By blocks of columns: on a CPU torch vectorises amax, and takes ten times as long for the index.
    """
    columns = rows.shape[1]
    whole = columns - columns % block
    maxima = rows[:, :whole].unflatten(1, (-1, block)).amax(-1) if whole else rows[:, :0]
    if whole < columns:
        maxima = torch.cat([maxima, rows[:, whole:].amax(-1, keepdim=True)], dim=1)
    best = maxima.argmax(-1)
    inside = (best[:, None] * block + torch.arange(block, device=rows.device)).clamp_(max=columns - 1)
    return maxima.gather(1, best[:, None]).squeeze(1), best * block + rows.gather(1, inside).argmax(-1)


def _center(logits: torch.Tensor, out: torch.Tensor, with_column: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write logits - max into `out`; the maximum [r, 1], and its column [r] if asked for."""
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    if with_column:
        maximum, column = row_argmax(logits)
    else:
        maximum, column = logits.amax(-1), None
    maximum = maximum.unsqueeze(-1)
    # a row that is -inf all over this shard has no probability here, and -inf - -inf would be NaN
    torch.sub(logits, maximum.masked_fill(maximum == -torch.inf, 0.0), out=out)
    return maximum, column


def _expectation(
    exponential: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor, has_masks: bool
) -> torch.Tensor:
    """Σ exponential * value over the columns; where the first is zero its limit is zero, whatever the second."""
    # multiply, then torch's pairwise sum: a BLAS dot product over 100k columns loses a digit
    torch.mul(exponential, value, out=scratch)
    if has_masks:
        scratch.masked_fill_(exponential == 0, 0.0)
    return scratch.sum(-1)


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
        needed: [n] bool; the others' sums mean nothing. Blocks without a needed token are not read.
        with_columns: find the maxima's token ids too.
    """
    result = _pair_sums(student, teacher, shard, needed, with_columns, has_masks=False)
    # A logit of -inf turns C or D into NaN: rare enough that only then the guarded pass is paid for
    if bool(result.sums.isnan().any()):
        result = _pair_sums(student, teacher, shard, needed, with_columns, has_masks=True)
    return result


def _pair_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    shard: VocabularyShard,
    needed: torch.Tensor | None,
    with_columns: bool,
    has_masks: bool,
) -> PartialSums:
    tokens = student.shape[:-1].numel()
    dtype, device = accumulation_dtype(student.dtype), student.device
    result = PartialSums.empty(tokens, dtype, device, with_columns=with_columns)
    result.has_masks = has_masks
    if shard.real == 0 or tokens == 0:
        return result
    size = min(tokens, block_rows(shard.real, device))
    buffers = scratch_buffers(4, size, shard.real, student)
    for place, (z, w) in row_blocks(size, student, teacher):
        if needed is not None and not bool(needed[place].any()):
            continue
        x, y, exponential, product = (buffer[: len(z)] for buffer in buffers)
        for model, logits, centered in ((0, z, x), (1, w, y)):
            maximum, column = _center(logits[:, : shard.real], centered, with_columns)
            result.maxima[place, model] = maximum.squeeze(-1)
            if result.columns is not None and column is not None:
                result.columns[place, model] = column + shard.first
        result.sums[place] = _block_sums(x, y, exponential, product, has_masks)
    return result


def _block_sums(
    x: torch.Tensor, y: torch.Tensor, exponential: torch.Tensor, product: torch.Tensor, has_masks: bool
) -> torch.Tensor:
    """[r, 6] of centered logits [r, c], which are overwritten; so are the other two buffers."""
    torch.exp(x, out=exponential)
    a, c = exponential.sum(-1), _expectation(exponential, x, product, has_masks)
    difference = torch.sub(y, x, out=x)
    e = _expectation(exponential, difference, product, has_masks)
    torch.exp(y, out=exponential)
    b, d = exponential.sum(-1), _expectation(exponential, y, product, has_masks)
    f = _expectation(exponential, difference, product, has_masks)
    return torch.stack([a, b, c, d, e, f], dim=-1)


def single_sums(logits: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [n] and the sums A, C [n, 2] of one model's logits [..., V], for its entropy alone. No collective."""
    maxima, sums = _single_sums(logits, shard, has_masks=False)
    return _single_sums(logits, shard, has_masks=True) if bool(sums.isnan().any()) else (maxima, sums)


def _single_sums(logits: torch.Tensor, shard: VocabularyShard, has_masks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.shape[:-1].numel()
    dtype = accumulation_dtype(logits.dtype)
    maxima = torch.full((tokens,), -torch.inf, dtype=dtype, device=logits.device)
    sums = torch.zeros(tokens, 2, dtype=dtype, device=logits.device)
    if shard.real == 0 or tokens == 0:
        return maxima, sums
    size = min(tokens, block_rows(shard.real, logits.device))
    buffers = scratch_buffers(2, size, shard.real, logits)
    for place, (rows,) in row_blocks(size, logits):
        x, exponential = (buffer[: len(rows)] for buffer in buffers)
        maximum, _ = _center(rows[:, : shard.real], x, with_column=False)
        maxima[place] = maximum.squeeze(-1)
        torch.exp(x, out=exponential)
        sums[place, 0] = exponential.sum(-1)
        sums[place, 1] = _expectation(exponential, x, x, has_masks)
    return maxima, sums


def reduce_maxima(part: PartialSums, group: ProcessGroup | None) -> PartialSums:
    """Global maxima and their columns: the first collective. The sums stay this rank's, moved to those maxima."""
    if group is None or len(part.maxima) == 0:
        return part
    if part.columns is None:
        maxima, columns = part.maxima.clone(), None
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
    else:
        maxima, columns = _reduce_argmax(part.maxima, part.columns, group)
    return PartialSums(maxima, move_sums(part.sums, part.maxima, maxima), columns, part.has_masks)


def add_sums(part: PartialSums, group: ProcessGroup | None, *others: torch.Tensor) -> PartialSums:
    """Sums over all ranks: the second collective. `others` [n, ...] ride along and are summed in place."""
    if group is None or len(part.sums) == 0:
        return part
    widths = [part.sums.shape[1], *(other.shape[1] for other in others)]
    together = torch.cat([part.sums, *others], dim=1)
    dist.all_reduce(together, group=group)
    sums, *rest = together.split(widths, dim=1)
    for other, total in zip(others, rest, strict=True):
        other.copy_(total)
    return PartialSums(part.maxima, sums, part.columns, part.has_masks)


def move_sums(sums: torch.Tensor, own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The six sums [n, 6] relative to maxima `own` [n, 2], made relative to `target`."""
    a, b, c, d, e, f = sums.unbind(-1)
    dx, dy = (own - target).unbind(-1)
    scale_x, scale_y = dx.exp(), dy.exp()
    moved = torch.stack([a, b, c + dx * a, d + dy * b, e + (dy - dx) * a, f + (dy - dx) * b], dim=-1)
    scale = torch.stack([scale_x, scale_y, scale_x, scale_y, scale_x, scale_y], dim=-1)
    return (moved * scale).masked_fill_(scale == 0, 0.0)  # nothing of this shard is left beside the global maximum


def _reduce_argmax(
    maxima: torch.Tensor, columns: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum over ranks with its column, the lowest of equals, in one MAX all-reduce of int64 keys.

    High half: the maximum's fp32 bits, made to sort as integers; low half: the column, counted down.
    """
    bits = (maxima.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: -0.0 equals 0.0
    keys = (_sortable(bits).long() << 32) | (0xFFFFFFFF - columns)
    dist.all_reduce(keys, dist.ReduceOp.MAX, group=group)
    bits = _sortable((keys >> 32).int())
    return bits.view(torch.float32).to(maxima.dtype), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _sortable(bits: torch.Tensor) -> torch.Tensor:
    """fp32 bits as int32 <-> integers in the order of the numbers; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
