"""LM heads applied chunk by chunk: logits of some tokens at a time, in fp32, and the products of the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_sead.distillation.partial_sums import accumulation_dtype

# Shapes: n tokens; r of them in a chunk; h hidden size; c real columns of the vocabulary on this rank

TILE = 2048  # head rows turned to fp32 at a time, where the product of low-precision matrices must be made in fp32


def chunk_rows(scratch_bytes: int, *heads: torch.Tensor) -> int:
    """Tokens whose logits [r, V/tp], hidden states and their gradient fit the scratch memory; at least one.

    Counts padding too: all ranks of a group must cut the same chunks, or their collectives would not meet.
    """
    bytes_per_token = sum(
        accumulation_dtype(head.dtype).itemsize * (head.shape[0] + 2 * head.shape[1]) for head in heads
    )
    return max(1, scratch_bytes // bytes_per_token)


def logit_chunks(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    rows: torch.Tensor | None,
    real: int,
    scratch_bytes: int,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Both models' logits [r, c] of the tokens `rows` (None: all) of [n, h], a chunk at a time.

    Args:
        real: c, the head rows that are tokens; padding takes no part in the products.

    Yields:
        place among `rows`; the student's hidden states [r, h] in its head's type; logits of student and teacher,
        in buffers that the next chunk overwrites and the caller may too.
    """
    count = len(student_hidden) if rows is None else len(rows)
    size = min(count, chunk_rows(scratch_bytes, student_head, teacher_head))
    # one type for both, or the two could not be subtracted
    dtype = accumulation_dtype(torch.promote_types(student_head.dtype, teacher_head.dtype))
    buffers = torch.empty(2, max(size, 1), real, dtype=dtype, device=student_head.device)
    for start in range(0, count, max(size, 1)):
        place = slice(start, min(start + size, count))
        chosen = place if rows is None else rows[place]
        hidden = student_hidden[chosen].to(student_head.dtype)
        student, teacher = (buffer[: len(hidden)] for buffer in buffers)
        project(hidden, student_head[:real], student)
        project(teacher_hidden[chosen].to(teacher_head.dtype), teacher_head[:real], teacher)
        yield place, hidden, student, teacher


def project(hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    """out [r, c] = hidden [r, h] @ head [c, h] transposed, summed and kept in out's type."""
    if head.dtype == out.dtype:
        torch.mm(hidden, head.t(), out=out)
    elif _has_wide_output(head, out):
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for tile in _tiles(head):
            torch.mm(wide, head[tile].to(out.dtype).t(), out=out[:, tile])


def hidden_gradient(gradient: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[r, h] = gradient of the logits [r, c] @ head [c, h], in the gradient's type."""
    if head.dtype == gradient.dtype:
        return gradient @ head
    if _has_wide_output(head, gradient):
        return torch.mm(gradient.to(head.dtype), head, out_dtype=gradient.dtype)
    result = gradient.new_zeros(len(gradient), head.shape[1])
    for tile in _tiles(head):
        result.addmm_(gradient[:, tile], head[tile].to(gradient.dtype))
    return result


def add_head_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """total [c, h] += gradient of the logits [r, c] transposed @ hidden [r, h], summed in total's type."""
    if _has_wide_output(hidden, total):
        narrow = gradient.to(hidden.dtype)
        for tile in _tiles(total):
            total[tile] += torch.mm(narrow[:, tile].t(), hidden, out_dtype=total.dtype)
    else:
        total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype))


def _has_wide_output(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    """Can this device multiply bf16 matrices into fp32? fp16 is left out: gradients underflow in it."""
    return narrow.is_cuda and narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32


def _tiles(head: torch.Tensor) -> Iterator[slice]:
    for start in range(0, len(head), TILE):
        yield slice(start, min(start + TILE, len(head)))
