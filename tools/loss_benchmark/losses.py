"""The losses that need no package: ours, plain torch, and the floors below which nobody can go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from loss_benchmark.cases import FLOOR_ROWS, FUSED, LOGITS, Computes, Inputs, Loss
from megatron_sead.distillation import linear_weighted_divergence, weighted_divergence

BOTH = Computes()
Step = Callable[[], Any]
Function = Callable[..., torch.Tensor]


def ours_on_logits(inputs: Inputs, reuse: bool) -> Step:
    group = inputs.group if inputs.case.tp > 1 else None
    weights = inputs.weights(BOTH)

    def step() -> None:
        loss = weighted_divergence(inputs.student, inputs.teacher, *weights, group=group, reuse_student_logits=reuse)
        loss.sum().backward()

    return step


def ours_fused(inputs: Inputs) -> Step:
    group = inputs.group if inputs.case.tp > 1 else None
    weights = inputs.weights(BOTH)
    student_head, teacher_head = inputs.heads

    def step() -> None:
        linear_weighted_divergence(
            inputs.student, student_head, inputs.teacher, teacher_head, *weights, group=group
        ).sum().backward()

    return step


def plain_torch(inputs: Inputs, compiled: bool) -> Step:
    """What one writes first: both log-softmaxes in fp32, both divergences, autograd."""
    weights = inputs.weights(BOTH)
    compile_maybe = _compiled if compiled else _unchanged
    if inputs.case.tp > 1:
        divergence = _sharded_divergence(inputs.group, compile_maybe)
    else:
        divergence = compile_maybe(_divergence)

    def step() -> None:
        student, teacher = inputs.student, inputs.teacher
        if inputs.heads:
            if inputs.case.tp > 1:
                student = _SumInBackward.apply(student, inputs.group)
            student, teacher = student @ inputs.heads[0].t(), teacher @ inputs.heads[1].t()
        divergence(student, teacher, *weights).backward()

    return step


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, forward_weight: torch.Tensor, reverse_weight: torch.Tensor
) -> torch.Tensor:
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return _weighted(log_p, log_q, forward_weight, reverse_weight)


def _weighted(
    log_p: torch.Tensor, log_q: torch.Tensor, forward_weight: torch.Tensor, reverse_weight: torch.Tensor
) -> torch.Tensor:
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (forward_weight * forward + reverse_weight * reverse).sum()


def _compiled(function: Function) -> Function:
    """For the very sizes of the case, as often as there are cases."""
    torch._dynamo.config.recompile_limit = 1024
    return torch.compile(function, dynamic=False)


def _unchanged(function: Function) -> Function:
    return function


def _sharded_divergence(group: ProcessGroup, compile_maybe: Callable[[Function], Function]) -> Function:
    """The same over a sharded vocabulary: what lies between the collectives is compiled, or not."""
    maxima = compile_maybe(lambda x, y: torch.stack([x.amax(-1), y.amax(-1)]).float())
    sums = compile_maybe(
        lambda x, y, m: torch.stack([(z.float() - t[:, None]).exp().sum(-1) for z, t in ((x, m[0]), (y, m[1]))])
    )
    local = compile_maybe(
        lambda x, y, m, s, *weights: _weighted(
            x.float() - m[0][:, None] - s[0].log()[:, None], y.float() - m[1][:, None] - s[1].log()[:, None], *weights
        )
    )

    def divergence(student: torch.Tensor, teacher: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            m = maxima(student, teacher)
            dist.all_reduce(m, dist.ReduceOp.MAX, group=group)
        s = _SumBothWays.apply(sums(student, teacher, m), group)
        loss: torch.Tensor = _SumInForward.apply(local(student, teacher, m, s, *weights), group)
        return loss

    return divergence


class _SumInForward(torch.autograd.Function):
    """Of parts whose sum every rank uses alike."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream, None


class _SumInBackward(torch.autograd.Function):
    """Of a replicated tensor that every rank uses in its own way."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = upstream.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumBothWays(torch.autograd.Function):
    """Of parts whose sum every rank uses in its own way."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _SumInForward.forward(ctx, part, group)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumInBackward.backward(ctx, upstream)


def copy_floor(inputs: Inputs) -> Step:
    """Both shards copied into memory that is there; at most FLOOR_ROWS rows of it, written again and again."""
    out = torch.empty_like(inputs.teacher[:FLOOR_ROWS])
    out.zero_()  # pages exist

    @torch.no_grad()
    def step() -> None:
        for tensor in (inputs.student, inputs.teacher):
            for rows in tensor.split(FLOOR_ROWS):
                out[: len(rows)].copy_(rows)

    return step


def product_floor(inputs: Inputs) -> Step:
    """The four matrix products of the tokens that have a weight, FLOOR_ROWS at a time, into memory that is there."""
    states = inputs.student.detach()[inputs.active], inputs.teacher[inputs.active]
    heads = inputs.heads[0].detach(), inputs.heads[1]
    logits = [states[0].new_zeros(min(FLOOR_ROWS, len(states[0])), len(heads[0])) for _ in range(2)]
    hidden_gradient, head_gradient = torch.zeros_like(states[0]), torch.zeros_like(heads[0])

    def step() -> None:
        for start in range(0, len(states[0]), FLOOR_ROWS):
            place = slice(start, start + FLOOR_ROWS)
            student, teacher = (buffer[: len(states[0][place])] for buffer in logits)
            torch.mm(states[0][place], heads[0].t(), out=student)
            torch.mm(states[1][place], heads[1].t(), out=teacher)
            torch.mm(student, heads[0], out=hidden_gradient[place])
            if start == 0:
                torch.mm(student.t(), states[0][place], out=head_gradient)
            else:
                head_gradient.addmm_(student.t(), states[0][place])

    return step


COPY, PRODUCTS = "floor: copy of both shards", "floor: the four matrix products"
OWN = (
    Loss(COPY, "floors", LOGITS, None, copy_floor, 0),
    Loss(PRODUCTS, "floors", FUSED, None, product_floor, 0),
    Loss("ours", "ours", LOGITS, BOTH, lambda inputs: ours_on_logits(inputs, False), 1.1),
    Loss(
        "ours, gradient over the logits",
        "ours",
        LOGITS,
        BOTH,
        lambda inputs: ours_on_logits(inputs, True),
        0.1,
        overwrites=True,
    ),
    Loss("ours", "ours", FUSED, BOTH, ours_fused, 0.1),
    Loss("torch, eager", "torch", LOGITS, BOTH, lambda inputs: plain_torch(inputs, False), 7),
    Loss("torch, compiled", "compiled", LOGITS, BOTH, lambda inputs: plain_torch(inputs, True), 4),
    Loss("torch, eager", "torch", FUSED, BOTH, lambda inputs: plain_torch(inputs, False), 9),
    Loss("torch, compiled", "compiled", FUSED, BOTH, lambda inputs: plain_torch(inputs, True), 6),
)
