"""The mathematics of a block of rows in torch: the eager kernels, and what `rows.cpp` and Triton's must equal.

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
    (x, student_maximum), (y, teacher_maximum) = _center(student), _center(teacher)
    p, q, difference = x.exp(), y.exp(), y - x  # p and q not yet normalised
    terms = [p, q, _weighted(p, x), _weighted(q, y), _weighted(p, difference), _weighted(q, difference)]
    sums = torch.stack([term.sum(-1) for term in terms], dim=-1)
    return torch.cat([student_maximum, teacher_maximum], dim=-1), sums


def single_sums(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [r, 1] and the sums A, C [r, 2] of one model's logits [r, c]."""
    x, maximum = _center(logits)
    p = x.exp()
    return maximum, torch.stack([p.sum(-1), _weighted(p, x).sum(-1)], dim=-1)


def _center(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits less their row's maximum, and that maximum [r, 1]."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    maximum = wide.amax(-1, keepdim=True)
    # a row that is -inf all over this shard has no probability here, and -inf - -inf would be NaN
    return wide - maximum.masked_fill(maximum == -torch.inf, 0.0), maximum


def move_sums(sums: torch.Tensor, own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The six sums [n, 6] relative to maxima `own` [n, 2], made relative to `target`: see `partial_sums`."""
    a, b, c, d, e, f = sums.unbind(-1)
    dx, dy = torch.where(own == target, 0.0, own - target).unbind(-1)  # equal, too, where both are -inf
    scale_x, scale_y = dx.exp(), dy.exp()
    moved = torch.stack([a, b, c + dx * a, d + dy * b, e + (dy - dx) * a, f + (dy - dx) * b], dim=-1)
    scale = torch.stack([scale_x, scale_y, scale_x, scale_y, scale_x, scale_y], dim=-1)
    # nothing of these columns is left beside a maximum far above theirs; NaN stays, to be found out
    return torch.where((scale == 0) & ~sums.isnan(), 0.0, moved * scale)


def move_single_sums(sums: torch.Tensor, own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sums A, C [n, 2] relative to maxima `own` [n, 1], made relative to `target`."""
    a, c = sums.split(1, dim=1)
    delta = torch.where(own == target, 0.0, own - target)
    scale = delta.exp()
    return torch.where((scale == 0) & ~sums.isnan(), 0.0, torch.cat([a, c + delta * a], dim=1) * scale)


def columns_of(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """[r] int64: first column that holds the maximum [r, 1]; c where none does, in a row with NaN.

    An elementwise pass and a minimum: on a CPU torch vectorises both, and does not vectorise argmax.
    """
    width = logits.shape[1]
    columns = torch.arange(width, dtype=torch.float32, device=logits.device)  # exact up to 2^24
    return torch.where(logits == maxima, columns, width).amin(-1).long()


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


def _weighted(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(p == 0, 0.0, p * value)
