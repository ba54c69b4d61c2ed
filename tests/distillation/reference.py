"""What the parts are compared with: textbook formulas in fp64, whole tensors, torch's own autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch

JUNK = float("nan")  # in padded columns; would spoil every sum that it entered


@dataclass
class Reference:
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor

    def loss(self, forward_weight: torch.Tensor, reverse_weight: torch.Tensor) -> torch.Tensor:
        return forward_weight.double() * self.forward_kl + reverse_weight.double() * self.reverse_kl


def reference(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> Reference:
    log_p, log_q = student_logits.double().log_softmax(-1), teacher_logits.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return Reference(
        -(p * log_p).sum(-1), -(q * log_q).sum(-1), (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
    )


def pad(tensor: torch.Tensor, columns: int, dim: int = -1) -> torch.Tensor:
    """With junk up to `columns` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = columns - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, JUNK)], dim)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor, in the 2-norm."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())
