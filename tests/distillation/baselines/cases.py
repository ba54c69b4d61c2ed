"""Logits that real ranks share, the same on every rank from one seed, and how a loss is compared with one process.

The formulas of the tests are fp64 on whole tensors with torch's own autograd. Tolerances: fp32 sums over a thousand
columns are good to a few 1e-7 of their size; 1e-6 for values and 2e-6 for gradients leave a factor of about four, and
a wrong gradient is off by far more. Low precision rounds the gradient once, to the logits' type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.distillation.ranks import CountedCollectives, Groups, Ranks
from tests.distillation.reference import pad, relative_error

PADDED = 1200
VOCAB_SIZES = [1200, 1003, 550]  # no padding; a part of the last shard; at TP 4 the last two shards hold padding alone
SHAPE = (3, 5)
VALUE_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}


@dataclass
class Case:
    student: torch.Tensor  # [3, 5, V]
    teacher: torch.Tensor
    forward_weight: torch.Tensor  # [3, 5], a third of them zero in both
    reverse_weight: torch.Tensor
    upstream: torch.Tensor
    targets: torch.Tensor
    old_log_probs: torch.Tensor


def make_case(vocab_size: int, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(vocab_size)
    teaches = (torch.arange(15) % 3 > 0).view(SHAPE)
    student, teacher = (torch.randn(*SHAPE, vocab_size).mul(3).to(dtype) for _ in range(2))
    targets = torch.randint(0, vocab_size, SHAPE)
    log_probs = student.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return Case(
        student=student,
        teacher=teacher,
        forward_weight=torch.rand(SHAPE) * teaches,
        reverse_weight=torch.rand(SHAPE) * teaches,
        upstream=torch.randn(SHAPE),
        targets=targets,
        old_log_probs=log_probs.float() + torch.randn(SHAPE) * 0.3,  # the ratio leaves [0.8, 1.2] on both sides
    )


def shard(whole: torch.Tensor, group: ProcessGroup, columns: int) -> torch.Tensor:
    """This rank's columns of the tensor, padded with junk to `columns`."""
    return pad(whole, columns).chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone()


def run_on_rank(
    groups: Groups, tp: str, columns: int, case: Case, loss_of: Callable[..., torch.Tensor], options: dict[str, Any]
) -> dict[str, Any]:
    logits = shard(case.student, groups[tp], columns).requires_grad_()
    teacher = shard(case.teacher, groups[tp], columns)
    with CountedCollectives() as forward:
        vocab_size = case.student.shape[-1]
        loss = loss_of(case, logits, teacher, group=groups[tp], vocab_size=vocab_size, **options)
    with CountedCollectives() as backward:
        loss.backward(case.upstream)
    return {
        "loss": loss.detach().numpy(),
        "gradient": logits.grad.double().numpy(),
        "types": (loss.dtype, logits.grad.dtype),
        "collectives": ([name for name, _ in forward], [name for name, _ in backward]),
    }


def compare(
    ranks: Ranks,
    tp: str,
    case: Case,
    loss_of: Callable[..., torch.Tensor],
    exact: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    collectives: list[str],
    *,
    columns: int = PADDED,
    **options: Any,
) -> None:
    """Asserts that values, gradients and collectives of `loss_of(case, student, teacher, *, group, vocab_size)` on
    ranks are those of `exact(student, teacher)` in one process.
    """
    logits = case.student.to(torch.float64, copy=True).requires_grad_()
    expected = exact(logits, case.teacher.double())
    expected.backward(case.upstream.double())
    found = ranks.run(run_on_rank, tp, columns, case, loss_of, options)[: int(tp)]
    for rank in found:
        _assert_close(torch.from_numpy(rank["loss"]).unsqueeze(-1), expected.detach().unsqueeze(-1), VALUE_TOLERANCE)
        assert rank["types"] == (torch.float32, case.student.dtype)
        assert rank["collectives"] == (collectives if tp != "1" else [], [])
    gradient = torch.cat([torch.from_numpy(rank["gradient"]) for rank in found], -1)
    vocab_size = case.student.shape[-1]
    _assert_close(gradient[..., :vocab_size], logits.grad, GRADIENT_TOLERANCE[case.student.dtype])
    assert not gradient[..., vocab_size:].any()


def _assert_close(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """As a whole, and token by token [..., w], so that a large one does not hide the others."""
    assert relative_error(value, expected) < tolerance
    error = (value.double() - expected).norm(dim=-1)
    assert (error < 2 * tolerance * (1 + expected.norm(dim=-1))).all()
