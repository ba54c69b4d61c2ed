"""GKD's Jensen-Shannon divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.distillation import token_statistics, weighted_divergence
from megatron_sead.distillation.baselines import generalized_jsd
from tests.distillation.baselines.cases import VOCAB_SIZES, Case, compare, make_case
from tests.distillation.ranks import Ranks
from tests.distillation.reference import relative_error

COLLECTIVES = ["all_reduce", "all_gather", "all_reduce"]  # the first asks whether all inputs are good


def loss_of(case: Case, student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
    return generalized_jsd(student, teacher, **options)


def textbook(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return (beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)).sum(-1)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_value_and_gradient(ranks: Ranks, tp: str, vocab_size: int) -> None:
    case = make_case(vocab_size)
    for beta in (0.5, 0.1, 0.93):
        compare(ranks, tp, case, loss_of, lambda z, w, beta=beta: textbook(z, w, beta), COLLECTIVES, beta=beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_logits(ranks: Ranks, dtype: torch.dtype) -> None:
    case = make_case(1003, dtype)
    compare(ranks, "2", case, loss_of, lambda z, w: textbook(z, w, 0.3), COLLECTIVES, beta=0.3)


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_near_the_ends_it_keeps_its_digits(beta: float) -> None:
    case = make_case(300)
    logits, exact = case.student.clone().requires_grad_(), case.student.double().requires_grad_()
    loss, expected = generalized_jsd(logits, case.teacher, beta=beta), textbook(exact, case.teacher.double(), beta)
    loss.sum().backward()
    expected.sum().backward()
    assert relative_error(loss.detach(), expected.detach()) < 2e-6
    assert relative_error(logits.grad, exact.grad) < 2e-6


@pytest.mark.parametrize(("beta", "weights"), [(1e-6, (1.0, 0.0)), (1 - 1e-6, (0.0, 1.0))])
def test_it_collapses_to_a_vanishing_multiple_of_a_kl(beta: float, weights: tuple[float, float]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 40), torch.randn(6, 40)  # ratios small against 1 / (1 - beta)
    logits, exact = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = generalized_jsd(logits, teacher, beta=beta)
    loss.sum().backward()
    kl = weighted_divergence(exact, teacher, *(torch.full((6,), weight) for weight in weights))
    kl.sum().backward()
    vanishing = min(beta, 1 - beta)
    # the next term is of the order of the largest ratio of probabilities times 1e-6
    assert relative_error(loss.detach() / vanishing, kl.detach()) < 1e-4
    assert relative_error(logits.grad / vanishing, exact.grad) < 1e-4


def extreme_case() -> Case:
    """Huge; masked alike, a whole shard too; masked in one model alone; without a token in common; equal."""
    case = make_case(60)
    student, teacher = case.student.flatten(0, 1), case.teacher.flatten(0, 1)
    student[0], teacher[0] = student[0].sign() * 1e4 + student[0], teacher[0].sign() * 1e4 + teacher[0]
    student[1, 5:35] = teacher[1, 5:35] = -torch.inf
    teacher[2, 3:40:2] = -torch.inf
    student[3, 3:40:2] = -torch.inf
    student[4, ::2], teacher[4, 1::2] = -torch.inf, -torch.inf
    student[5] = teacher[5] + 3
    return case


@pytest.mark.parametrize("beta", [0.2, 0.9])
@pytest.mark.parametrize("tp", ["1", "4"])
def test_extreme_and_masked_logits_have_their_limits(ranks: Ranks, tp: str, beta: float) -> None:
    def textbook_with_limits(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        # no -inf where autograd would multiply it by zero; e^-20000 is as good as none
        return textbook(student.clamp(min=-2e4), teacher.clamp(min=-2e4), beta)

    compare(ranks, tp, extreme_case(), loss_of, textbook_with_limits, COLLECTIVES, columns=60, beta=beta)


def test_models_without_a_token_in_common_are_at_the_upper_bound() -> None:
    case, beta = extreme_case(), 0.3
    loss = generalized_jsd(case.student, case.teacher, beta=beta).flatten()
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert loss[4].item() == pytest.approx(bound, rel=1e-6)
    assert 0 <= loss[5] < 1e-6


def test_models_that_nearly_agree_are_not_below_zero_and_still_have_a_gradient() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(3000, 2)
    logits = (teacher + 1e-7 * torch.randn(3000, 2)).requires_grad_()
    loss = generalized_jsd(logits, teacher, beta=0.3)
    loss.sum().backward()
    assert (loss >= 0).all() and logits.grad[loss == 0].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), beta=st.floats(1e-6, 1 - 1e-6), scale=st.floats(0, 20))
def test_bounds_and_symmetry(seed: int, beta: float, scale: float) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(4, 50) * scale, torch.randn(4, 50) * scale
    loss = generalized_jsd(student, teacher, beta=beta)
    found = token_statistics(student, teacher)
    slack = 1e-6 * (1 + found.forward_kl.max() + found.reverse_kl.max())
    assert (loss >= 0).all()
    assert (loss <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + slack).all()
    assert (loss <= beta * found.forward_kl + slack).all() and (loss <= (1 - beta) * found.reverse_kl + slack).all()
    mirrored = generalized_jsd(teacher, student, beta=1 - beta)
    torch.testing.assert_close(loss, mirrored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_beta_at_the_ends_and_beyond_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta={beta}: must be between 0 and 1, .*weighted_divergence"):
        generalized_jsd(torch.zeros(2, 5), torch.zeros(2, 5), beta=beta)


def test_other_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher_logits is"):
        generalized_jsd(torch.zeros(2, 5), torch.zeros(2, 6), beta=0.5)
    with pytest.raises(ValueError, match="vocab_size=6"):
        generalized_jsd(torch.zeros(2, 5), torch.zeros(2, 5), beta=0.5, vocab_size=6)
