"""The mathematics of a block of rows, once: run as they are by the eager kernels, compiled by torch.compile.

Sums and gradient are those of `partial_sums` and `divergence`, in fp32 (fp64 for fp64 logits). Where e^x is zero, so
are its products: a logit of -inf is a token that the model holds impossible, and 0 * inf must not become NaN.
"""

from __future__ import annotations

import torch

# Shapes: r rows; c columns, all of them tokens


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pair_sums(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [r, 2] and the sums A to F [r, 6] of logits [r, c]."""
    x, student_maximum = _center(student)
    y, teacher_maximum = _center(teacher)
    p, q = x.exp(), y.exp()  # not yet normalised
    difference = y - x
    sums = [
        p.sum(-1),
        q.sum(-1),
        _expectation(p, x),
        _expectation(q, y),
        _expectation(p, difference),
        _expectation(q, difference),
    ]
    return torch.cat([student_maximum, teacher_maximum], dim=-1), torch.stack(sums, dim=-1)


def single_sums(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [r, 1] and the sums A, C [r, 2] of one model's logits [r, c]."""
    x, maximum = _center(logits)
    p = x.exp()
    return maximum, torch.stack([p.sum(-1), _expectation(p, x)], dim=-1)


def columns_of(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """[r] int64: first column that holds the maximum [r, 1]; 0 where none does, of a row of NaN.

    An elementwise pass and a minimum: on a CPU torch vectorises both, and does not vectorise argmax.
    """
    width = logits.shape[1]
    columns = torch.arange(width, dtype=torch.float32, device=logits.device)  # exact up to 2^24
    first = torch.where(logits == maxima, columns, width).amin(-1).long()
    return torch.where(first == width, 0, first)


def gradient(student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """e^x (α - β (y-x)) - γ e^y [r, c]; rows whose α, β, γ are all zero are zero, whatever their logits.

    Args:
        coefficients: [r, 5] α, -β, -γ, and both maxima.
    """
    alpha, minus_beta, minus_gamma, student_maximum, teacher_maximum = coefficients.unsqueeze(-1).unbind(1)
    x = student.to(coefficients.dtype) - student_maximum
    y = teacher.to(coefficients.dtype) - teacher_maximum
    p = x.exp()
    # a β of zero wins over an infinite difference
    from_student = p * torch.where(minus_beta == 0, alpha, alpha + minus_beta * (y - x))
    from_teacher = minus_gamma * y.exp()
    total = torch.where(p == 0, 0.0, from_student) + torch.where(minus_gamma == 0, 0.0, from_teacher)
    teaches = (alpha != 0) | (minus_beta != 0) | (minus_gamma != 0)
    return torch.where(teaches, total, 0.0)


def _center(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits less their maximum [r, c], and the maximum [r, 1]."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    maximum = wide.amax(-1, keepdim=True)
    # a row that is -inf all over this shard has no probability here, and -inf - -inf would be NaN
    return wide - maximum.masked_fill(maximum == -torch.inf, 0.0), maximum


def _expectation(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(p == 0, 0.0, p * value).sum(-1)
