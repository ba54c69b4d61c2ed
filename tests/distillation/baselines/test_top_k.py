"""Divergences and entropy over the teacher's top-k."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.distillation import token_statistics, weighted_divergence
from megatron_sead.distillation.baselines import top_k_divergence, top_k_entropy
from tests.distillation.baselines.cases import PADDED, VOCAB_SIZES, Case, compare, make_case, shard
from tests.distillation.ranks import Groups, Ranks
from tests.distillation.reference import reference, relative_error

TAILS = ["bucket", "renormalize"]
COLLECTIVES = ["all_reduce", "all_gather"]


def loss_of(case: Case, student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
    return top_k_divergence(student, teacher, case.forward_weight, case.reverse_weight, **options)


def textbook_buckets(logits: torch.Tensor, chooser: torch.Tensor, k: int, tail: str) -> torch.Tensor:
    """Log-probabilities over the buckets, in fp64."""
    order = chooser.sort(dim=-1, descending=True, stable=True).indices
    log_probs = logits.double().log_softmax(-1)
    inside = log_probs.gather(-1, order[..., :k])
    if tail == "renormalize":
        return inside.log_softmax(-1)
    if k == logits.shape[-1]:
        return inside
    return torch.cat([inside, log_probs.gather(-1, order[..., k:]).logsumexp(-1, keepdim=True)], -1)


def textbook(case: Case, student: torch.Tensor, teacher: torch.Tensor, k: int, tail: str) -> torch.Tensor:
    log_p, log_q = (textbook_buckets(logits, teacher, k, tail) for logits in (student, teacher))
    forward, reverse = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    return case.forward_weight.double() * forward + case.reverse_weight.double() * reverse


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_value_and_gradient(ranks: Ranks, tp: str, vocab_size: int, tail: str) -> None:
    case = make_case(vocab_size)
    for k in (1, 20, 400):  # 400: more than a shard holds at TP 4
        if k == 1 and tail == "renormalize":
            continue  # zero, below
        compare(ranks, tp, case, loss_of, lambda z, w, k=k: textbook(case, z, w, k, tail), COLLECTIVES, k=k, tail=tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tp", ["1", "4"])
def test_all_tokens_are_the_exact_divergence(ranks: Ranks, tp: str, tail: str) -> None:
    case = make_case(550)

    def exact(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return reference(student, teacher).loss(case.forward_weight, case.reverse_weight)

    compare(ranks, tp, case, loss_of, exact, COLLECTIVES, k=550, tail=tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_of_logits(ranks: Ranks, tail: str, dtype: torch.dtype) -> None:
    case = make_case(1003, dtype)
    compare(ranks, "2", case, loss_of, lambda z, w: textbook(case, z, w, 50, tail), COLLECTIVES, k=50, tail=tail)


@pytest.mark.parametrize("tail", TAILS)
def test_bf16_with_many_equals_around_the_last_of_the_top_k(ranks: Ranks, tail: str) -> None:
    case = make_case(1003, torch.bfloat16)
    ordered = case.teacher.sort(dim=-1, descending=True).values
    assert (ordered[..., 199] == ordered[..., 200]).sum() > 5
    compare(ranks, "2", case, loss_of, lambda z, w: textbook(case, z, w, 200, tail), COLLECTIVES, k=200, tail=tail)


@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_of_equal_logits_the_lowest_tokens_are_chosen(ranks: Ranks, tp: str) -> None:
    case = make_case(40)
    case.teacher.copy_(case.teacher.sign())  # two values, in all shards
    case.teacher[0] = 0.0
    case.teacher[0, :, ::2] = -0.0
    exact = {k: textbook(case, case.student, case.teacher, k, "renormalize") for k in (3, 4)}
    assert relative_error(exact[3], exact[4]) > 1e-2  # another choice would be seen
    for k in (3, 12, 30):
        for tail in TAILS:
            compare(
                ranks,
                tp,
                case,
                loss_of,
                lambda z, w, k=k, tail=tail: textbook(case, z, w, k, tail),
                COLLECTIVES,
                columns=40,
                k=k,
                tail=tail,
            )


def entropy_on_rank(groups: Groups, tp: str, case: Case, k: int, tail: str) -> Any:
    logits = shard(case.teacher, groups[tp], PADDED).requires_grad_()
    found = top_k_entropy(logits, k=k, tail=tail, group=groups[tp], vocab_size=case.teacher.shape[-1])
    assert not found.requires_grad and found.dtype == torch.float32
    return found.numpy()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "4"])
def test_entropy(ranks: Ranks, tp: str, vocab_size: int, tail: str) -> None:
    case = make_case(vocab_size)
    for k in (20, vocab_size):
        log_q = textbook_buckets(case.teacher, case.teacher, k, tail)
        expected = -(log_q.exp() * log_q).sum(-1)
        for found in ranks.run(entropy_on_rank, tp, case, k, tail):
            assert relative_error(torch.from_numpy(found), expected) < 1e-6


def extreme_case() -> Case:
    """Huge; fewer tokens unmasked than are chosen; a masked shard; the student's rest masked."""
    case = make_case(60)
    student, teacher = case.student.flatten(0, 1), case.teacher.flatten(0, 1)
    case.forward_weight.fill_(0.7)
    case.reverse_weight.fill_(0.4)
    student[0], teacher[0] = student[0].sign() * 1e4 + student[0], teacher[0].sign() * 1e4 + teacher[0]
    student[1, 6:] = teacher[1, 6:] = -torch.inf
    student[2, 15:30] = teacher[2, 15:30] = -torch.inf
    rest = teacher[3].sort(descending=True).indices[10:]
    student[3, rest] = -torch.inf
    case.forward_weight.view(-1)[3] = 0  # infinite
    return case


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tp", ["1", "4"])
def test_extreme_and_masked_logits_have_their_limits(ranks: Ranks, tp: str, tail: str) -> None:
    case = extreme_case()

    def textbook_with_limits(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        # no -inf where autograd would multiply it by zero; e^-30000 is as good as none
        return textbook(case, student.clamp(min=-3e4), teacher.clamp(min=-3e4), 10, tail)

    compare(ranks, tp, case, loss_of, textbook_with_limits, COLLECTIVES, columns=60, k=10, tail=tail)


def test_a_rest_that_the_student_holds_impossible_is_infinite() -> None:
    case = extreme_case()
    case.forward_weight.fill_(1.0)
    case.reverse_weight.fill_(0.0)
    logits = case.student.requires_grad_()
    loss = loss_of(case, logits, case.teacher, k=10)
    loss.sum().backward()
    assert loss.view(-1)[3] == torch.inf and loss.view(-1)[4:].isfinite().all()
    assert logits.grad.isfinite().all()


def test_a_top_k_that_the_student_holds_impossible_is_the_teachers_rest() -> None:
    case = make_case(60)
    top = case.teacher.sort(dim=-1, descending=True).indices[..., :5]
    logits = case.student.scatter(-1, top, -torch.inf).requires_grad_()
    loss = top_k_divergence(logits, case.teacher, torch.zeros(3, 5), torch.ones(3, 5), k=5)
    loss.sum().backward()
    expected = -textbook_buckets(case.teacher, case.teacher, 5, "bucket")[..., -1]
    assert relative_error(loss.detach(), expected) < 1e-6
    assert not logits.grad.any()  # p of the last bucket is one, whatever its tokens do


def test_the_tail_bucket_teaches_tokens_outside_the_top_k() -> None:
    """Also where the bucket's divergence is nearly zero, or would be below it by rounding."""
    torch.manual_seed(0)
    teacher = torch.randn(4, 100)
    for distance in (1.0, 1e-3):
        logits = (teacher + distance * torch.randn(4, 100)).requires_grad_()
        exact = logits.detach().double().requires_grad_()
        weights = torch.ones(4), torch.zeros(4)
        top_k_divergence(logits, teacher, *weights, k=5).sum().backward()
        case = make_case(100)
        case.forward_weight, case.reverse_weight = weights
        textbook(case, exact, teacher, 5, "bucket").sum().backward()
        outside = teacher.sort(dim=-1, descending=True).indices[:, 5:]
        expected = exact.grad.gather(1, outside)
        # p - q of the bucket: fp32 knows each to 1e-7
        torch.testing.assert_close(logits.grad.gather(1, outside).double(), expected, rtol=1e-4, atol=1e-8)


def test_one_renormalized_token_teaches_nothing() -> None:
    case = make_case(30)
    logits = case.student.requires_grad_()
    loss = loss_of(case, logits, case.teacher, k=1, tail="renormalize")
    loss.sum().backward()
    assert not loss.any() and not logits.grad.any()


def test_tokens_without_weight_have_no_gradient_whatever_their_logits() -> None:
    case = make_case(30)
    silent = (case.forward_weight == 0) & (case.reverse_weight == 0)
    for tail in TAILS:
        logits = case.student.clone()
        logits[silent] = torch.nan
        logits.requires_grad_()
        loss = loss_of(case, logits, case.teacher, k=4, tail=tail)
        loss.sum().backward()
        assert not loss[silent].any() and not logits.grad[silent].any()
        assert logits.grad.isfinite().all() and logits.grad[~silent].any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), k=st.integers(1, 60), scale=st.floats(0, 15), distance=st.sampled_from([1e-4, 0.1, 1.0])
)
def test_buckets_are_a_lower_bound_that_grows_with_k(seed: int, k: int, scale: float, distance: float) -> None:
    torch.manual_seed(seed)
    teacher = torch.randn(4, 61) * scale
    student = teacher + torch.randn(4, 61) * scale * distance
    exact = token_statistics(student, teacher)
    one, zero = torch.ones(4), torch.zeros(4)
    for weights, whole in (((one, zero), exact.forward_kl), ((zero, one), exact.reverse_kl)):
        few, more = (top_k_divergence(student, teacher, *weights, k=size) for size in (k, k + 1))
        slack = 1e-6 * (1 + whole)
        assert (few >= 0).all()
        assert (few <= more + slack).all() and (more <= whole + slack).all()
        assert (top_k_divergence(student, teacher, *weights, k=k, tail="renormalize") >= 0).all()
    few, more = (top_k_entropy(teacher, k=size) for size in (k, k + 1))
    assert (few <= more + 1e-6).all() and (more <= exact.teacher_entropy + 1e-6).all()


def test_logits_that_are_not_contiguous() -> None:
    case = make_case(50)
    student, teacher = case.student.transpose(0, 1), case.teacher.transpose(0, 1)
    weights = case.forward_weight.t(), case.reverse_weight.t()
    loss = top_k_divergence(student, teacher, *weights, k=50)
    assert relative_error(loss, weighted_divergence(student.contiguous(), teacher.contiguous(), *weights)) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0: must be from 1 to 8"),
        ({"k": 9}, "k=9: must be from 1 to 8"),
        ({"tail": "drop"}, 'tail="drop": must be "renormalize" or "bucket"'),
        ({"vocab_size": 11}, "vocab_size=11"),
        ({"vocab_size": None, "k": 11}, "k=11: must be from 1 to 10"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    logits, arguments = torch.zeros(2, 10), {"k": 8, "vocab_size": 8} | changes
    with pytest.raises(ValueError, match=message):
        top_k_entropy(logits, **arguments)
    with pytest.raises(ValueError, match=message):
        top_k_divergence(logits, logits, torch.ones(2), torch.ones(2), **arguments)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits = torch.zeros(2, 10)
    with pytest.raises(ValueError, match="teacher_logits is"):
        top_k_divergence(logits, torch.zeros(3, 10), torch.ones(2), torch.ones(2), k=2)
    with pytest.raises(ValueError, match=r"reverse_weight is \[1\]"):
        top_k_divergence(logits, logits, torch.ones(2), torch.ones(1), k=2)


def k_beyond_a_small_vocabulary_on_rank(groups: Groups) -> str:
    logits = torch.zeros(2, 300)
    try:
        top_k_entropy(logits, k=551, group=groups["4"], vocab_size=550)
    except ValueError as error:
        return str(error)
    return ""


def test_every_rank_refuses_alike(ranks: Ranks) -> None:
    assert set(ranks.run(k_beyond_a_small_vocabulary_on_rank)) == {
        "k=551: must be from 1 to 550, the tokens of the vocabulary (on rank 0 of the group)"
    }
