"""Bad inputs are refused in one line that says what is wrong, on every rank alike, so that none waits for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.kernels.formulas import accumulation_dtype


class NotFiniteError(ValueError):
    """Logits of a token are NaN or +inf, or nothing but -inf: the numbers are at fault, not the call."""


def check_logits(**logits: torch.Tensor) -> None:
    """All [..., V/tp] of one shape, floating type and device.

    Raises:
        ValueError: they are not.
    """
    (name, first), *others = logits.items()
    if first.dim() < 1 or not first.is_floating_point():
        raise ValueError(f"{name}: must be floating point of shape [..., vocabulary], not {_describe(first)}")
    for other, tensor in others:
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{other} is {_describe(tensor)}, {name} {_describe(first)}: shapes, types and devices must be equal"
            )


def require_tensors(**values: object) -> None:
    """Check types first, before anything is asked of the values.

    Raises:
        TypeError: another kind of object; on this rank alone, since the others cannot be told without a shape.
    """
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: must be a torch.Tensor, not {type(value).__name__}")


def weights_per_token(
    shape: torch.Size, device: torch.device, **weights: torch.Tensor | float
) -> tuple[torch.Tensor, ...]:
    """Weights [...], one a token; a number is the weight of all of them.

    Raises:
        ValueError: neither a number nor real tensors of this shape and device.
    """
    tensors = {
        name: torch.full(shape, float(weight), device=device) if isinstance(weight, int | float) else weight
        for name, weight in weights.items()
    }
    check_per_token(shape, device, **tensors)
    for name, weight in tensors.items():
        if weight.is_complex():
            raise ValueError(f"{name} is {_describe(weight)}: must be real")
    return tuple(tensors.values())


def check_per_token(shape: torch.Size, device: torch.device, **values: torch.Tensor) -> None:
    """Each value [...] holds one number a token.

    Raises:
        ValueError: no tensor, another shape or device.
    """
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: must be a tensor of one number a token, not {type(value).__name__}")
        if value.shape != shape or value.device != device:
            raise ValueError(
                f"{name} is {_describe(value)}: must be one number a token, of shape {list(shape)} on {device}"
            )


def whole_shape(hidden: torch.Tensor, sequence_group: ProcessGroup | None) -> torch.Size:
    """Shape of the tokens of hidden states [..., h], whole or, of a sequence group, this rank's shard [s/tp, ...]."""
    if sequence_group is None:
        return hidden.shape[:-1]
    if hidden.dim() < 2:
        raise ValueError(f"hidden states have shape {list(hidden.shape)}: must be [s/tp, ..., h] if sequence_parallel")
    return torch.Size([hidden.shape[0] * dist.get_world_size(sequence_group), *hidden.shape[1:-1]])


def check_heads(
    student_hidden: torch.Tensor, student_head: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor
) -> None:
    """Hidden states [..., h] of the same tokens and heads [V/tp, h] over the same columns.

    Raises:
        ValueError: sizes, types or devices do not fit.
    """
    for who, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if head.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != head.shape[1]:
            raise ValueError(
                f"{who}_hidden is {_describe(hidden)}, {who}_head {_describe(head)}: must be [..., h] and [V/tp, h]"
            )
        if not hidden.is_floating_point() or not head.is_floating_point() or hidden.device != head.device:
            raise ValueError(
                f"{who}_hidden is {_describe(hidden)}, {who}_head {_describe(head)}: "
                "must be floating point on the same device"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1] or student_hidden.device != teacher_hidden.device:
        raise ValueError(
            f"teacher_hidden is {_describe(teacher_hidden)}, student_hidden {_describe(student_hidden)}: "
            "must hold the same tokens on the same device"
        )
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"teacher_head has {teacher_head.shape[0]} columns of the vocabulary on this rank, student_head "
            f"{student_head.shape[0]}: must be equal"
        )


def refuse(
    problem: ValueError,
    like: torch.Tensor,
    tokens: int,
    group: ProcessGroup | None,
    *,
    models: int = 2,
    sums: int = 6,
    with_columns: bool = False,
) -> NoReturn:
    """Raise a rank's problem on every rank of the group.

    The others may be in the two collectives of a call over `tokens` tokens: `models` maxima a token (with columns, as
    integer keys), then `sums` numbers. This rank takes part with NaN, from which they learn of the problem.
    """
    if group is None or dist.get_world_size(group) == 1:
        raise problem
    dtype = accumulation_dtype(like.dtype) if like.is_floating_point() else torch.float32
    keys = torch.zeros(tokens, models, dtype=torch.int64 if with_columns else dtype, device=like.device)
    dist.all_reduce(keys, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(torch.full((tokens, sums), torch.nan, dtype=dtype, device=like.device), group=group)
    raise_together(str(problem), group)


def agree(
    group: ProcessGroup | None, device: torch.device, *, problem: ValueError | None = None, tokens: int = 0
) -> None:
    """Do all ranks of the group have good inputs, and as many tokens to work on? One all-reduce of three numbers.

    Raises:
        ValueError: this rank's problem, another's, or they have not.
    """
    if group is None or dist.get_world_size(group) == 1:
        if problem is not None:
            raise problem
        return
    message = torch.tensor([problem is not None, tokens, -tokens], device=device)
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    failed, most, least = message.tolist()
    if failed:
        raise_together(None if problem is None else str(problem), group)
    _require_as_many(most, -least)


def _require_as_many(most: int, least: int) -> None:
    if most != least:
        raise ValueError(
            f"ranks of the group have from {least} to {most} tokens to work on: weights, targets and hidden states "
            "must be those of the same tokens on all"
        )


@dataclass(frozen=True)
class Chosen:
    """Tokens that a call works on, of those that it is given."""

    tokens: torch.Tensor  # [k] their indices, ascending
    counts: list[int]  # how many are in each equal part of the sequence: one, or as many as ranks share it


def choose(
    chosen: torch.Tensor,
    group: ProcessGroup | None,
    *,
    parts: int = 1,
    problem: tuple[torch.Tensor, Callable[[], str]] | None = None,
) -> Chosen:
    """`agree`, for tokens that the device knows: the tokens [n] bool that are chosen, with a single read.

    Args:
        parts: of equal length, into which the sequence is cut.
        problem: whether there is one, a bool on the device, and what it is.

    Raises:
        ValueError: this rank's problem, another's, or ranks have chosen different numbers of tokens.
    """
    counts = torch.stack([part.sum() for part in chosen.tensor_split(parts)])
    total = counts.sum()
    failed = torch.zeros_like(total) if problem is None else problem[0].to(total.dtype)
    message = torch.stack([failed, total, -total])
    if group is not None:
        dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    found, most, least, own, *of_parts = torch.cat([message, failed[None], counts]).tolist()
    if found:
        raise_together(problem[1]() if own and problem is not None else None, group)
    _require_as_many(most, -least)
    return Chosen(places_of(chosen, most), of_parts)


def places_of(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """[count] where `chosen` [n] bool is true, ascending. As ``nonzero``, which reads the count from the device."""
    return chosen.to(torch.uint8).argsort(descending=True, stable=True)[:count]


@contextmanager
def refused_together(group: ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """A ValueError that the body raises on a rank is raised on all: the others learn of it in their next `agree`."""
    try:
        yield
    except ValueError as problem:
        agree(group, device, problem=problem)
        raise


def refuse_nan_loss(loss: torch.Tensor, real: int, group: ProcessGroup | None, **logits: torch.Tensor) -> None:
    """Raise for the first token whose loss [...] is NaN, naming logits [..., V/tp] that are at fault in real columns.

    Raises:
        ValueError: there is one, on every rank alike.
    """
    bad = loss.flatten().isnan()
    if not bool(bad.any()):
        return
    token = int(bad.nonzero()[0])
    rows = {name: tensor.reshape(-1, tensor.shape[-1])[token, :real] for name, tensor in logits.items()}
    at_fault = [name.replace("_", " ") for name, row in rows.items() if not bool((row < torch.inf).all())]
    _raise_for_token(token, len(bad), " and ".join(at_fault), group)


def refuse_nan(bad: torch.Tensor, own_normalizers: torch.Tensor, group: ProcessGroup | None) -> None:
    """Raise for the first token whose result is NaN.

    Args:
        bad: [n] bool, the same on every rank.
        own_normalizers: [n, models] this rank's sums A and B, NaN where its own logits are at fault.

    Raises:
        ValueError: there is one; says which model, which token, and on which rank.
    """
    if not bool(bad.any()):
        return
    token = int(bad.nonzero()[0])
    at_fault = own_normalizers[token].isnan().tolist()
    models = [name for name, fault in zip(("student", "teacher"), at_fault, strict=False) if fault]
    _raise_for_token(token, len(bad), f"{' and '.join(models)} logits" if models else "", group)


def _raise_for_token(token: int, tokens: int, at_fault: str, group: ProcessGroup | None) -> NoReturn:
    """Raise for a token what all ranks find in it; `at_fault` names this rank's logits that are wrong, or is empty."""
    problem = f"{at_fault} of token {token} (of {tokens}) are NaN or +inf" if at_fault else None
    otherwise = f"token {token} (of {tokens}): all its logits are -inf, or a weight is NaN"
    raise_together(problem, group, otherwise, kind=NotFiniteError)


def raise_together(
    problem: str | None,
    group: ProcessGroup | None,
    otherwise: str = "another rank failed",
    *,
    kind: type[ValueError] = ValueError,
) -> NoReturn:
    """Raise the first problem that any rank has. A rank that only knows that there is one raises `otherwise`."""
    if group is None:
        raise kind(problem or otherwise)
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    found = [f"{text} (on rank {rank} of the group)" for rank, text in enumerate(problems) if text is not None]
    raise kind(found[0] if found else otherwise)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
