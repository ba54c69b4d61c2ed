"""The clipped loss of the sampled token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sead.distillation import weighted_divergence
from megatron_sead.distillation.baselines import sampled_token_loss
from tests.distillation.baselines.cases import VOCAB_SIZES, Case, compare, make_case
from tests.distillation.ranks import Ranks
from tests.distillation.reference import relative_error


def loss_of(case: Case, student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
    return sampled_token_loss(student, teacher, case.targets, case.old_log_probs, **options)


def textbook(case: Case, student: torch.Tensor, teacher: torch.Tensor, clip: float) -> torch.Tensor:
    index = case.targets.unsqueeze(-1)
    log_p, log_q = (z.log_softmax(-1).gather(-1, index).squeeze(-1) for z in (student, teacher))
    advantage, ratio = (log_q - log_p).detach(), (log_p - case.old_log_probs.double()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_value_and_gradient(ranks: Ranks, tp: str, vocab_size: int) -> None:
    case = make_case(vocab_size)
    gathered = ["all_reduce", "all_gather"]
    compare(ranks, tp, case, loss_of, lambda z, w: textbook(case, z, w, 0.2), gathered)
    compare(ranks, tp, case, loss_of, lambda z, w: textbook(case, z, w, 0.35), gathered, clip=0.35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_logits(ranks: Ranks, dtype: torch.dtype) -> None:
    case = make_case(1003, dtype)
    compare(ranks, "2", case, loss_of, lambda z, w: textbook(case, z, w, 0.2), ["all_reduce", "all_gather"])


def extreme_case() -> Case:
    """Huge logits; ties of all tokens; a shard that is masked as a whole in both models."""
    case = make_case(60)
    student, teacher = case.student.flatten(0, 1), case.teacher.flatten(0, 1)
    student[0] = student[0].sign() * 1e4 + student[0]
    teacher[0] = teacher[0].sign() * 1e4 + teacher[0]
    student[1], teacher[1] = -7.0, 3.0
    student[2, 15:30] = teacher[2, 15:30] = -torch.inf
    targets, old = case.targets.view(-1), case.old_log_probs.view(-1)
    targets[:3] = torch.tensor([int(student[0].argmax()), 31, 5])
    old[:3] = student[:3].double().log_softmax(-1).gather(-1, targets[:3, None]).squeeze(-1) + 0.1
    return case


@pytest.mark.parametrize("tp", ["1", "4"])
def test_extreme_and_masked_logits(ranks: Ranks, tp: str) -> None:
    case = extreme_case()
    compare(ranks, tp, case, loss_of, lambda z, w: textbook(case, z, w, 0.2), ["all_reduce", "all_gather"], columns=60)


@pytest.mark.parametrize(
    ("teacher_prefers", "shift", "slope"),
    [
        (True, 0.0, -1.0),
        (True, 0.5, 0.0),  # already more probable than it was, by more than the clip: no further
        (True, -0.5, -1.0),
        (False, 0.0, 1.0),
        (False, 0.5, 1.0),
        (False, -0.5, 0.0),
    ],
)
def test_which_side_is_clipped(teacher_prefers: bool, shift: float, slope: float) -> None:
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    teacher[0, 2] = 1.0 if teacher_prefers else -1.0
    logits = student.requires_grad_()
    log_p, log_q = student.detach().log_softmax(-1)[:, 2], teacher.log_softmax(-1)[:, 2]
    sampled_token_loss(logits, teacher, torch.tensor([2]), log_p - shift).sum().backward()
    expected = slope * abs(log_q - log_p) * torch.tensor(shift).exp() * 0.75  # 1 - p_y
    torch.testing.assert_close(logits.grad[0, 2], expected.squeeze(), rtol=1e-6, atol=1e-7)


def test_its_mean_over_tokens_has_the_gradient_of_the_reverse_kl() -> None:
    torch.manual_seed(0)
    row, teacher = torch.randn(30), torch.randn(30)
    probabilities = row.log_softmax(-1)
    logits = row.repeat(30, 1).requires_grad_()
    loss = sampled_token_loss(logits, teacher.repeat(30, 1), torch.arange(30), probabilities)
    loss.backward(probabilities.exp())
    exact = row.clone().requires_grad_()
    weighted_divergence(exact, teacher, torch.tensor(0.0), torch.tensor(1.0)).backward()
    assert relative_error(logits.grad.sum(0), exact.grad) < 2e-6


def test_no_tokens() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = sampled_token_loss(logits, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.sum().backward()
    assert loss.shape == (0,) and logits.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([3, 8])}, "token 8 among targets: must be from 0 to 7"),
        ({"targets": torch.tensor([-100, 3])}, "token -100 among targets: must be from 0 to 7"),
        ({"targets": torch.tensor([1.0, 3.0])}, "targets are torch.float32: must be token ids"),
        ({"targets": torch.tensor([1])}, r"targets is \[1\]"),
        ({"old_log_probs": torch.zeros(2, 1)}, r"old_log_probs is \[2, 1\]"),
        ({"clip": 0.0}, "clip=0.0: must be between 0 and 1"),
        ({"clip": 1.0}, "clip=1.0: must be between 0 and 1"),
        ({"vocab_size": 11}, "vocab_size=11"),
        ({"teacher_logits": torch.zeros(2, 9)}, r"teacher_logits is \[2, 9\]"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "student_logits": torch.zeros(2, 10),
        "teacher_logits": torch.zeros(2, 10),
        "targets": torch.tensor([0, 7]),
        "old_log_probs": torch.zeros(2),
        "vocab_size": 8,
    }
    sampled_token_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        sampled_token_loss(**(arguments | changes))
