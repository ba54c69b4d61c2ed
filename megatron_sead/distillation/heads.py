"""LM heads applied chunk by chunk: logits of some tokens at a time, in fp32, and the products of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import Chosen
from megatron_sead.distillation.chunks import Chunk, token_chunks
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.scratch import large_empty

# Shapes: n tokens on this rank; k of all ranks' chosen; r of them in a chunk; h hidden size; c real columns of the
# vocabulary on this rank; tp ranks of the tensor-parallel group

T = TypeVar("T")

CHUNK_TOKENS = 512  # unless scratch_bytes says otherwise: fewer, and the products are slower than whole ones
ALIGNMENT = 16  # elements at whose multiples rows of logits begin, for the kernels' wide loads
TILE = 2048  # head rows turned to fp32 at a time, where the product of low-precision matrices must be made in fp32


def chunk_rows(scratch_bytes: int | None, buffers: int, *heads: torch.Tensor) -> int:
    """Tokens whose logits [r, V/tp] (`buffers` times), hidden states and gradients fit the scratch memory; at least 1.

    Counts padding too: all ranks of a group must cut the same chunks, or their collectives would not meet.
    """
    if scratch_bytes is None:
        return CHUNK_TOKENS // buffers
    bytes_per_token = sum(
        accumulation_dtype(head.dtype).itemsize * (buffers * head.shape[0] + 4 * head.shape[1]) for head in heads
    )
    return max(1, scratch_bytes // bytes_per_token)


def logit_chunks(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    chosen: Chosen,
    real: int,
    *,
    scratch_bytes: int | None,
    buffers: int,
    sequence_group: ProcessGroup | None,
) -> Iterator[tuple[Chunk, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Both models' logits [r, c] of the chosen tokens, a chunk at a time.

    Args:
        student: hidden states [n, h] and head [V/tp, h]; so is teacher.
        chosen: in as many parts as ranks of the sequence group.
        real: c, the head rows that are tokens; padding takes no part in the products.
        buffers: pairs of logits that the caller uses at a time.
        sequence_group: ranks over which the hidden states' tokens are split; None: each rank has all.

    Yields:
        the chunk; the student's hidden states [r, h] in its head's type; logits of student and teacher, in buffers
        that a later chunk overwrites and the caller may too.
    """
    if len(chosen.tokens) == 0:
        return
    heads = student[1], teacher[1]
    size = chunk_rows(scratch_bytes, buffers, *heads)
    rows = min(len(chosen.tokens), size if sequence_group is None else max(size, sequence_group.size()))
    # one type for both, or the two could not be subtracted
    dtype = accumulation_dtype(torch.promote_types(heads[0].dtype, heads[1].dtype))
    width = _aligned(real)
    count = min(buffers, -(-len(chosen.tokens) // rows))

    def start(chunk: Chunk) -> tuple[Chunk, list[Callable[[], torch.Tensor]]]:
        return chunk, [chunk.start_gather(hidden, sequence_group) for hidden, _ in (student, teacher)]

    started = _one_ahead(map(start, token_chunks(chosen, size, sequence_group, len(student[0]))))
    memory = [large_empty((count, rows, width), dtype, heads[0].device) for _ in heads]
    for turn, (chunk, (student_states, teacher_states)) in enumerate(started):
        logits = [of_model[turn % count, : len(chunk.tokens)] for of_model in memory]
        states = student_states().to(heads[0].dtype)
        project(states, heads[0], logits[0], real)
        project(teacher_states().to(heads[1].dtype), heads[1], logits[1], real)
        yield chunk, states, logits[0][:, :real], logits[1][:, :real]


def _one_ahead(started: Iterator[T]) -> Iterator[T]:
    """Yield the same items, but start each one before its predecessor is handed out."""
    previous: list[T] = []
    for current in started:
        yield from previous
        previous = [current]
    yield from previous


def project(hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor, real: int) -> None:
    """out [r, c] = hidden [r, h] @ the first rows [c, h] of a head transposed, summed and kept in out's type.

    Args:
        out: at least c wide. On a GPU the columns up to its width may hold products with the head's padding.
        real: c.
    """
    if head.dtype == out.dtype:
        torch.mm(head[:real], hidden.t(), out=out[:, :real].t())  # on a CPU some percent faster than hidden times head
    elif _has_wide_output(head, out):
        width = _aligned_width(real, len(head))
        torch.mm(hidden, head[:width].t(), out_dtype=out.dtype, out=out[:, :width])
    else:
        wide = hidden.to(out.dtype)
        for tile in _tiles(head[:real]):
            torch.mm(wide, head[tile].to(out.dtype).t(), out=out[:, tile])


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _aligned_width(real: int, rows: int) -> int:
    """Width of a product that a GPU's library makes at full speed: with another one it takes twice as long."""
    return _aligned(real) if _aligned(real) <= rows else real


def gradient_of(logits: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Where the gradient [r, c] of a chunk's logits is written: over them, or beside them in the head's type.

    The second where products of that type are summed in fp32: the kernel that writes it rounds, and no conversion
    follows. That memory may be wider, for `add_head_gradient`; what stands in its further columns means nothing.
    """
    real = logits.shape[1]
    if not _has_wide_output(head, logits):
        return logits
    memory = torch.empty(len(logits), _aligned(real), dtype=head.dtype, device=head.device)
    return memory[:, : _aligned_width(real, len(head))]


def hidden_gradient(gradient: torch.Tensor, head: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[r, h] = gradient of the logits [r, c] @ head [c, h], in `dtype`, in which they were computed."""
    if head.dtype == dtype:
        return gradient @ head
    if gradient.dtype == head.dtype:
        # padding may hold anything, and nothing times NaN is NaN: so the last columns come on their own
        whole = len(head) // ALIGNMENT * ALIGNMENT
        result = torch.mm(gradient[:, :whole], head[:whole], out_dtype=dtype)
        if whole < len(head):
            torch.addmm(result, gradient[:, whole:], head[whole:], out_dtype=dtype, out=result)
        return result
    result = gradient.new_zeros(len(gradient), head.shape[1])
    for tile in _tiles(head):
        result.addmm_(gradient[:, tile], head[tile].to(gradient.dtype))
    return result


def add_head_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, *, first: bool) -> None:
    """total [c, h] += gradient of the logits [r, c] transposed @ hidden [r, h], summed in total's type.

    Args:
        gradient: all of what `gradient_of` returned; so many rows has total.
        first: `total` holds nothing yet, and is written instead.
    """
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden.to(total.dtype), beta=0 if first else 1)
    elif first:
        torch.mm(gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)


def _has_wide_output(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    """Can this device multiply bf16 matrices into fp32? fp16 is left out: gradients underflow in it."""
    return narrow.is_cuda and narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32


def _tiles(head: torch.Tensor) -> Iterator[slice]:
    for start in range(0, len(head), TILE):
        yield slice(start, min(start + TILE, len(head)))
