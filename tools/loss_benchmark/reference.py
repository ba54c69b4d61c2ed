"""Gradients in fp64, and how far a loss's are from them.

Everything is gathered and every rank forms the whole reference, so that no collective of autograd's is trusted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from loss_benchmark.cases import Computes, Inputs

# Shapes: T tokens; V vocabulary; h hidden size

ROWS = 4096  # head rows widened to fp64 at a time


def gradient_errors(inputs: Inputs, computes: Computes) -> dict[str, float]:
    """Relative 2-norm of each leaf's gradient against fp64 on the same inputs, over all ranks.

    The gradients are those in `.grad` of the inputs' leaves. A loss that overwrites the logits must have them
    restored first.
    """
    student, teacher = (_whole_logits(inputs, index) for index in range(2))
    student.requires_grad_()
    _loss(student, teacher, computes, *inputs.weights(computes)).backward()
    assert student.grad is not None
    rank, columns = dist.get_rank(inputs.group), inputs.case.columns
    gradient = student.grad[:, rank * columns : (rank + 1) * columns]
    errors = {}
    for name, leaf in inputs.leaves.items():
        squares = torch.zeros(2, dtype=torch.float64, device=student.device)  # of the error, of the reference
        if leaf.grad is None:
            squares[0] = torch.nan
        elif name == "logits":
            squares += _squares(leaf.grad, gradient)
        elif name == "head":
            hidden = inputs.student.detach().double()
            for start in range(0, columns, ROWS):
                rows = slice(start, start + ROWS)
                squares += _squares(leaf.grad[rows], gradient[:, rows].t() @ hidden)
        else:
            right = torch.zeros(leaf.shape, dtype=torch.float64, device=leaf.device)
            for start in range(0, columns, ROWS):
                rows = slice(start, start + ROWS)
                right.addmm_(gradient[:, rows], inputs.heads[0].detach()[rows].double())
            dist.all_reduce(right, group=inputs.group)
            squares += _squares(leaf.grad, right)
        dist.all_reduce(squares, group=inputs.group)
        errors[name] = float((squares[0] / squares[1]).sqrt())
    return errors


def _squares(value: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([(value.double() - right).square().sum(), right.square().sum()])


def _whole_logits(inputs: Inputs, index: int) -> torch.Tensor:
    """[T, V] in fp64, of the student (0) or the teacher (1)."""
    own = (inputs.student, inputs.teacher)[index].detach().double()
    if inputs.heads:
        head = inputs.heads[index].detach()
        own = torch.cat([own @ rows.double().t() for rows in head.split(ROWS)], dim=1)
    shards = [torch.empty_like(own) for _ in range(inputs.case.tp)]
    dist.all_gather(shards, own.contiguous(), group=inputs.group)
    return torch.cat(shards, dim=1)


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
    return (forward_weight.double() * terms.sum(-1) + reverse_weight.double() * reverse).sum()
