"""Statistics and losses over a vocabulary that real ranks share, against one process in fp64.

Tolerances: fp32 sums over a thousand columns are good to a few 1e-7 of their size; 2e-6 (logits) and 3e-6 (fused, whose
logits are fp32 products too) leave a factor of about four, and a wrong gradient is off by far more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sead.distillation import (
    linear_divergence,
    linear_token_scores,
    linear_weighted_divergence,
    token_statistics,
    vocab_parallel_entropy,
    weighted_divergence,
)
from tests.distillation.ranks import CountedCollectives, Groups, Ranks
from tests.distillation.reference import pad, reference, relative_error

PADDED = 1200
VOCAB_SIZES = [1200, 1003, 550]  # no padding; a part of the last shard; at TP 4 the last two shards hold padding alone
STOPS = ((1, 7, 540), (3, 540))


@dataclass
class Case:
    """Everything that a comparison needs, from one seed, on every rank alike."""

    student: torch.Tensor  # [3, 5, V]
    teacher: torch.Tensor
    forward_weight: torch.Tensor  # [3, 5], a third of them zero in both
    reverse_weight: torch.Tensor
    upstream: torch.Tensor
    student_hidden: torch.Tensor  # [3, 5, 24]
    student_head: torch.Tensor  # [V, 24]
    teacher_hidden: torch.Tensor  # [3, 5, 40]
    teacher_head: torch.Tensor
    targets: torch.Tensor  # [3, 5]


def make_case(vocab_size: int, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    teaches = (torch.arange(15) % 3 > 0).view(3, 5)
    return Case(
        student=torch.randn(3, 5, vocab_size) * 3,
        teacher=torch.randn(3, 5, vocab_size) * 3,
        forward_weight=torch.rand(3, 5) * teaches,
        reverse_weight=torch.rand(3, 5) * teaches,
        upstream=torch.randn(3, 5),
        student_hidden=torch.randn(3, 5, 24),
        student_head=torch.randn(vocab_size, 24) * 0.6,
        teacher_hidden=torch.randn(3, 5, 40),
        teacher_head=torch.randn(vocab_size, 40) * 0.5,
        targets=torch.randint(0, vocab_size, (3, 5)),
    )


def shard(whole: torch.Tensor, groups: Groups, tp: str, dim: int = -1) -> torch.Tensor:
    """This rank's columns of the padded tensor."""
    return pad(whole, PADDED, dim).chunk(int(tp), dim)[dist.get_rank(groups[tp])].clone()


def statistics_on_rank(groups: Groups, tp: str, vocab_size: int) -> dict[str, Any]:
    case, arguments = make_case(vocab_size), {"group": groups[tp], "vocab_size": vocab_size}
    with CountedCollectives() as sizes:
        found = token_statistics(shard(case.student, groups, tp), shard(case.teacher, groups, tp), **arguments)
    entropy = vocab_parallel_entropy(shard(case.student, groups, tp), **arguments)
    return {name: value.numpy() for name, value in (vars(found) | {"entropy": entropy}).items()} | {
        "sizes": [size for _, size in sizes]
    }


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_statistics(ranks: Ranks, tp: str, vocab_size: int) -> None:
    case = make_case(vocab_size)
    expected = vars(reference(case.student, case.teacher))
    expected["entropy"] = expected["student_entropy"]
    for found in ranks.run(statistics_on_rank, tp, vocab_size):
        for name, value in expected.items():
            assert relative_error(torch.from_numpy(found[name]), value) < 1e-6, name
        same = case.student.argmax(-1) == case.teacher.argmax(-1)
        assert (torch.from_numpy(found["same_argmax"]) == same).all()
        assert found["sizes"] == ([15 * 2, 15 * 6] if tp != "1" else [])


def loss_on_rank(groups: Groups, tp: str, vocab_size: int, reuse: bool) -> dict[str, Any]:
    case = make_case(vocab_size)
    logits = shard(case.student, groups, tp).requires_grad_()
    with CountedCollectives() as forward:
        loss = weighted_divergence(
            logits,
            shard(case.teacher, groups, tp),
            case.forward_weight,
            case.reverse_weight,
            group=groups[tp],
            vocab_size=vocab_size,
            reuse_student_logits=reuse,
        )
    with CountedCollectives() as backward:
        loss.backward(case.upstream)
    return {
        "loss": loss.detach().numpy(),
        "gradient": logits.grad.numpy(),
        "forward": [size for _, size in forward],
        "backward": [size for _, size in backward],
        "reused": logits.grad.data_ptr() == logits.data_ptr(),
    }


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_loss_on_logits(ranks: Ranks, tp: str, vocab_size: int, reuse: bool) -> None:
    case = make_case(vocab_size)
    logits = case.student.double().requires_grad_()
    loss = reference(logits, case.teacher).loss(case.forward_weight, case.reverse_weight)
    loss.backward(case.upstream.double())
    found = ranks.run(loss_on_rank, tp, vocab_size, reuse)[: int(tp)]
    for rank in found:
        assert relative_error(torch.from_numpy(rank["loss"]), loss.detach()) < 1e-6
        assert rank["forward"] == ([15 * 2, 15 * 6] if tp != "1" else []) and rank["backward"] == []
        assert rank["reused"] == reuse
    gradient = torch.cat([torch.from_numpy(rank["gradient"]) for rank in found], -1)
    assert relative_error(gradient[..., :vocab_size], logits.grad) < 2e-6
    assert not gradient[..., vocab_size:].any()


@contextmanager
def overlapping(overlap: bool) -> Iterator[None]:
    """Collectives go on beside products, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_divergence, "_overlaps", lambda group, device: overlap and group is not None)
        yield


def fused_loss_on_rank(
    groups: Groups, tp: str, vocab_size: int, upstream: str | None, scratch_bytes: int, overlap: bool
) -> dict[str, Any]:
    case = make_case(vocab_size)
    hidden = case.student_hidden.requires_grad_()
    head = shard(case.student_head, groups, tp, 0).requires_grad_()
    with overlapping(overlap), CountedCollectives() as sizes:
        loss = linear_weighted_divergence(
            hidden,
            head,
            case.teacher_hidden,
            shard(case.teacher_head, groups, tp, 0),
            case.forward_weight,
            case.reverse_weight,
            group=groups[tp],
            vocab_size=vocab_size,
            scratch_bytes=scratch_bytes,
        )
        if upstream is None:
            (1.7 * loss.sum()).backward()
        else:
            loss.backward(case.upstream)
    return {
        "loss": loss.detach().numpy(),
        "hidden": hidden.grad.numpy(),
        "head": head.grad.numpy(),
        "sizes": [size for _, size in sizes],
    }


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("upstream", [None, "per token"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_loss_fused_with_the_heads(ranks: Ranks, tp: str, vocab_size: int, upstream: str | None, overlap: bool) -> None:
    case = make_case(vocab_size)
    student_hidden = case.student_hidden.double().requires_grad_()
    head = case.student_head.double().requires_grad_()
    teacher = case.teacher_hidden.double() @ case.teacher_head.double().t()
    loss = reference(student_hidden @ head.t(), teacher).loss(case.forward_weight, case.reverse_weight)
    loss.backward(torch.full((3, 5), 1.7) if upstream is None else case.upstream)
    # room for 4 tokens at a time: of the 10 that have a weight, the last chunk holds 2
    buffers = 2 if overlap and tp != "1" else 1
    scratch_bytes = 4 * 4 * (buffers * 2 * PADDED // int(tp) + 4 * (24 + 40))
    found = ranks.run(fused_loss_on_rank, tp, vocab_size, upstream, scratch_bytes, overlap)[: int(tp)]
    for rank in found:
        assert relative_error(torch.from_numpy(rank["loss"]), loss.detach()) < 2e-6
        assert relative_error(torch.from_numpy(rank["hidden"]), student_hidden.grad) < 3e-6
        # agreement; then maxima, sums and hidden gradient of each chunk
        maxima, sums, hidden = 4 * 2, 4 * 6, 4 * 24
        if overlap:  # a chunk's hidden gradient is formed once the next one's maxima are on their way
            a_pass = [3, maxima, sums, maxima, hidden, sums, 2 * 2, hidden, 2 * 6, 2 * 24]
        else:
            a_pass = [3, maxima, sums, hidden, maxima, sums, hidden, 2 * 2, 2 * 6, 2 * 24]
        assert rank["sizes"] == ([] if tp == "1" else a_pass if upstream is None else a_pass * 2)
    gradient = torch.cat([torch.from_numpy(rank["head"]) for rank in found])
    assert relative_error(gradient[:vocab_size], head.grad) < 3e-6
    assert not gradient[vocab_size:].any()


def scores_on_rank(groups: Groups, tp: str, vocab_size: int) -> dict[str, Any]:
    case = make_case(vocab_size)
    with CountedCollectives() as sizes:
        scores = linear_token_scores(
            case.student_hidden.flatten(0, 1),
            shard(case.student_head, groups, tp, 0),
            case.teacher_hidden.flatten(0, 1),
            shard(case.teacher_head, groups, tp, 0),
            case.targets.flatten(),
            student_stop_token_ids=STOPS[0],
            teacher_stop_token_ids=STOPS[1],
            group=groups[tp],
            vocab_size=vocab_size,
            scratch_bytes=50_000,
        )
    fields = {name: value for name, value in vars(scores).items() if name != "statistics"}
    fields |= vars(scores.statistics)
    return {name: value.numpy() for name, value in fields.items()} | {"sizes": [size for _, size in sizes]}


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_scores(ranks: Ranks, tp: str, vocab_size: int) -> None:
    case = make_case(vocab_size)
    student = (case.student_hidden.double() @ case.student_head.double().t()).flatten(0, 1)
    teacher = (case.teacher_hidden.double() @ case.teacher_head.double().t()).flatten(0, 1)
    expected = vars(reference(student, teacher))
    for who, logits, stops in (("student", student, STOPS[0]), ("teacher", teacher, STOPS[1])):
        log_probs = logits.log_softmax(-1)
        expected[f"{who}_log_prob"] = log_probs.gather(1, case.targets.flatten()[:, None]).squeeze(1)
        expected[f"{who}_stop_probability"] = log_probs.exp()[:, list(stops)].sum(-1)
    for found in ranks.run(scores_on_rank, tp, vocab_size):
        for name, value in expected.items():
            assert relative_error(torch.from_numpy(found[name]), value) < 2e-6, name
        assert found["same_argmax"].tolist() == (student.argmax(-1) == teacher.argmax(-1)).tolist()
        assert found["sizes"] == ([3, 15 * 2, 15 * 10] if tp != "1" else [])


def own_columns(whole: torch.Tensor, groups: Groups, tp: str) -> torch.Tensor:
    return whole.chunk(int(tp), -1)[dist.get_rank(groups[tp])].clone()


def tied_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Student, teacher [4, 8]; equal maxima in several shards."""
    student, teacher = torch.zeros(4, 8), torch.zeros(4, 8)
    student[0, [1, 6]], teacher[0, [1, 7]] = 5, 5  # the lowest is 1 in both
    student[1, [1, 6]], teacher[1, 6] = 5, 5  # 1 against 6, although both have 6
    student[2], teacher[2] = -3, -0.0  # 0 in both
    student[2, 2:], teacher[2, 4:] = -3, 0.0
    student[3], teacher[3, [3, 5]] = -2e4, -1e-3  # 0 against 0
    return student, teacher


def tied_argmax_on_rank(groups: Groups, tp: str) -> list[bool]:
    halves = [own_columns(logits, groups, tp) for logits in tied_logits()]
    return token_statistics(*halves, group=groups[tp]).same_argmax.tolist()


@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_the_lowest_of_equal_tokens_is_the_argmax(ranks: Ranks, tp: str) -> None:
    for found in ranks.run(tied_argmax_on_rank, tp):
        assert found == [True, False, True, True]


def extremes_on_rank(groups: Groups, tp: str) -> dict[str, Any]:
    logits, teacher = (own_columns(whole, groups, tp) for whole in extreme_logits())
    logits.requires_grad_()
    found = token_statistics(logits, teacher, group=groups[tp])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss = weighted_divergence(logits, teacher, *weights, group=groups[tp])
    loss.sum().backward()
    return {name: value.numpy() for name, value in vars(found).items()} | {
        "loss": loss.detach().numpy(),
        "gradient": logits.grad.numpy(),
    }


def extreme_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """[4, 60]: huge; masked alike, a whole shard too; masked in the teacher alone; masked in the student alone."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 60), torch.randn(4, 60)
    student[0], teacher[0] = student[0].sign() * 1e4 + student[0], teacher[0].sign() * 1e4 + teacher[0]
    student[1, 5:35] = teacher[1, 5:35] = -torch.inf
    teacher[2, 3:40:2] = -torch.inf
    student[3, 3:40:2] = -torch.inf
    return student, teacher


@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_extreme_and_masked_logits_have_their_limits(ranks: Ranks, tp: str) -> None:
    student, teacher = extreme_logits()
    p, q = student.double().softmax(-1), teacher.double().softmax(-1)
    log_ratio = student.double().log_softmax(-1) - teacher.double().log_softmax(-1)
    forward = torch.where(q == 0, 0.0, -q * log_ratio).sum(-1)
    reverse = torch.where(p == 0, 0.0, p * log_ratio).sum(-1)
    assert forward.isinf().tolist() == [False, False, False, True]
    assert reverse.isinf().tolist() == [False, False, True, False]
    expected = torch.zeros(4, 60, dtype=torch.float64)
    expected[:3] = (p - q)[:3]
    own_part = torch.where(p == 0, 0.0, p * (log_ratio - reverse[:, None]))
    expected[[0, 1, 3]] += own_part[[0, 1, 3]]
    found = ranks.run(extremes_on_rank, tp)[: int(tp)]
    for rank in found:
        torch.testing.assert_close(torch.from_numpy(rank["forward_kl"]).double(), forward, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(rank["reverse_kl"]).double(), reverse, rtol=1e-6, atol=1e-6)
        entropy = torch.special.entr(p).sum(-1)
        torch.testing.assert_close(torch.from_numpy(rank["student_entropy"]).double(), entropy, rtol=1e-6, atol=1e-6)
        loss = torch.stack([*(forward + reverse)[:2], forward[2], reverse[3]])
        torch.testing.assert_close(torch.from_numpy(rank["loss"]).double(), loss, rtol=1e-6, atol=1e-6)
    gradient = torch.cat([torch.from_numpy(rank["gradient"]) for rank in found], -1)
    for row in range(4):
        assert relative_error(gradient[row], expected[row]) < 2e-6, row
