"""Bad inputs are refused before the first collective, on every rank alike, in one line that says what is wrong."""

from __future__ import annotations

import torch


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


def check_per_token(shape: torch.Size, device: torch.device, **values: torch.Tensor) -> None:
    """Each value [...] holds one number a token.

    Raises:
        ValueError: another shape or device.
    """
    for name, value in values.items():
        if value.shape != shape or value.device != device:
            raise ValueError(
                f"{name} is {_describe(value)}: must be one number a token, of shape {list(shape)} on {device}"
            )


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


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
