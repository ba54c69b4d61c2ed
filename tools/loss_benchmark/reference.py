"""Gradients in fp64, and how far a loss's are from them.

Everything is gathered and every rank forms the whole reference, so that no collective of autograd's is trusted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from loss_benchmark.cases import Computes, Inputs

# Shapes: T tokens; V vocabulary; h hidden size

HEAD_ROWS = 4096  # widened to fp64 at a time
TOKENS = 64  # whose whole logits exist at a time


def gradient_errors(inputs: Inputs, computes: Computes) -> dict[str, float]:
    """Relative 2-norm of each leaf's gradient against fp64 on the same inputs, over all ranks.

    The gradients are those in `.grad` of the inputs' leaves. A loss that overwrites the logits must have them
    restored first.
    """
    gradient = _logit_gradient(inputs, computes)
    errors = {}
    for name, leaf in inputs.leaves.items():
        squares = gradient.new_zeros(2)  # of the error, of the reference
        if leaf.grad is None:
            squares[0] = torch.nan
        elif name == "logits":
            squares += _squares(leaf.grad, gradient)
        elif name == "head":
            hidden = inputs.student.detach().double()
            for start in range(0, len(leaf), HEAD_ROWS):
                rows = slice(start, start + HEAD_ROWS)
                squares += _squares(leaf.grad[rows], gradient[:, rows].t() @ hidden)
        else:
            right = torch.zeros(leaf.shape, dtype=torch.float64, device=leaf.device)
            for columns, rows in zip(
                gradient.split(HEAD_ROWS, dim=1), inputs.heads[0].detach().split(HEAD_ROWS), strict=True
            ):
                right.addmm_(columns, rows.double())
            dist.all_reduce(right, group=inputs.group)
            squares += _squares(leaf.grad, right)
        dist.all_reduce(squares, group=inputs.group)
        errors[name] = float((squares[0] / squares[1]).sqrt())
    return errors


def _squares(value: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([(value.double() - right).square().sum(), right.square().sum()])


def _logit_gradient(inputs: Inputs, computes: Computes) -> torch.Tensor:
    """[T, V/tp] in fp64, of the student's logits."""
    own = [_own_logits(inputs, index).split(TOKENS) for index in range(2)]
    weights = [weight.double().split(TOKENS) for weight in inputs.weights(computes)]
    columns = slice(*(inputs.case.columns * (dist.get_rank(inputs.group) + i) for i in (0, 1)))
    gradients = []
    for student_part, teacher_part, *weight in zip(*own, *weights, strict=True):
        student = _gather(student_part, inputs).requires_grad_()
        _loss(student, _gather(teacher_part, inputs), computes, *weight).backward()
        assert student.grad is not None
        gradients.append(student.grad[:, columns].clone())
    return torch.cat(gradients)


def _own_logits(inputs: Inputs, index: int) -> torch.Tensor:
    """[T, V/tp] in fp64, of the student (0) or the teacher (1)."""
    own = (inputs.student, inputs.teacher)[index].detach().double()
    if inputs.heads:
        own = torch.cat([own @ rows.double().t() for rows in inputs.heads[index].detach().split(HEAD_ROWS)], dim=1)
    return own


def _gather(shard: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[..., V] from [..., V/tp]."""
    shards = [torch.empty_like(shard) for _ in range(inputs.case.tp)]
    dist.all_gather(shards, shard.contiguous(), group=inputs.group)
    return torch.cat(shards, dim=-1)


def _loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    computes: Computes,
    forward_weight: torch.Tensor,
    reverse_weight: torch.Tensor,
) -> torch.Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    terms = log_q.exp() * (log_q - log_p)
    if computes.top is not None:
        terms = terms.gather(-1, log_q.topk(computes.top, dim=-1).indices)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (forward_weight * terms.sum(-1) + reverse_weight * reverse).sum()
