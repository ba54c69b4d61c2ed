"""Hidden states spread over the sequence give what whole ones give, gathered for a chunk at a time.

Tolerances as in test_tensor_parallel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sead.distillation import linear_token_scores, linear_weighted_divergence
from tests.distillation.ranks import Groups, Ranks
from tests.distillation.reference import reference, relative_error
from tests.distillation.test_tensor_parallel import PADDED, STOPS, overlapping, shard

SEQUENCE, BATCH, VOCAB = 8, 3, 1003
TEACHING = {
    "all": torch.ones(SEQUENCE, BATCH, dtype=torch.bool),
    "a part": torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH) % 3 > 0,
    "the end": torch.arange(SEQUENCE)[:, None].expand(SEQUENCE, BATCH) >= 5,  # the first ranks have none
    "one": torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH) == 13,
    "none": torch.zeros(SEQUENCE, BATCH, dtype=torch.bool),
}


def make_case(teaching: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "student_hidden": torch.randn(SEQUENCE, BATCH, 24),
        "student_head": torch.randn(VOCAB, 24) * 0.6,
        "teacher_hidden": torch.randn(SEQUENCE, BATCH, 40),
        "teacher_head": torch.randn(VOCAB, 40) * 0.5,
        "forward_weight": torch.rand(SEQUENCE, BATCH) * TEACHING[teaching],
        "reverse_weight": torch.rand(SEQUENCE, BATCH) * TEACHING[teaching],
    }


def on_rank(groups: Groups, tp: str, teaching: str, rows: int, per_token: bool) -> dict[str, np.ndarray]:
    case = make_case(teaching)
    own = slice(SEQUENCE // int(tp) * dist.get_rank(groups[tp]), SEQUENCE // int(tp) * (dist.get_rank(groups[tp]) + 1))
    hidden = case["student_hidden"][own].clone().requires_grad_()
    head = shard(case["student_head"], groups, tp, 0).requires_grad_()
    with overlapping(True):
        loss = linear_weighted_divergence(
            hidden,
            head,
            case["teacher_hidden"][own],
            shard(case["teacher_head"], groups, tp, 0),
            case["forward_weight"],
            case["reverse_weight"],
            group=groups[tp],
            vocab_size=VOCAB,
            scratch_bytes=rows * 4 * (4 * PADDED // int(tp) + 4 * (24 + 40)),
            sequence_parallel=True,
        )
        loss.backward(upstream(per_token))
    return {"loss": loss.detach().numpy(), "hidden": hidden.grad.numpy(), "head": head.grad.numpy()}


def upstream(per_token: bool) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(SEQUENCE, BATCH) if per_token else torch.full((SEQUENCE, BATCH), 1.7)


@pytest.mark.parametrize(
    ("tp", "teaching", "rows", "per_token"),
    [
        ("2", "all", 100, False),
        ("2", "a part", 4, False),
        ("2", "a part", 4, True),
        ("2", "the end", 1, False),
        ("4", "a part", 5, False),
        ("4", "the end", 3, True),
        ("4", "one", 3, False),
        ("4", "none", 3, False),
        ("1", "a part", 3, False),
    ],
)
def test_loss(ranks: Ranks, tp: str, teaching: str, rows: int, per_token: bool) -> None:
    case = make_case(teaching)
    hidden, head = (case[name].double().requires_grad_() for name in ("student_hidden", "student_head"))
    teacher = case["teacher_hidden"].double() @ case["teacher_head"].double().t()
    loss = reference(hidden @ head.t(), teacher).loss(case["forward_weight"], case["reverse_weight"])
    loss.backward(upstream(per_token).double())
    found = ranks.run(on_rank, tp, teaching, rows, per_token)[: int(tp)]
    whole = {name: np.concatenate([rank[name] for rank in found]) for name in ("hidden", "head")}
    if teaching == "none":
        assert not any(value.any() for value in (found[0]["loss"], *whole.values()))
        return
    for rank in found:
        assert relative_error(torch.from_numpy(rank["loss"]), loss.detach()) < 2e-6
    assert relative_error(torch.from_numpy(whole["hidden"]), hidden.grad) < 3e-6
    assert relative_error(torch.from_numpy(whole["head"][:VOCAB]), head.grad) < 3e-6
    assert not whole["head"][VOCAB:].any()


def scores_on_rank(groups: Groups, tp: str, spread: bool) -> dict[str, Any]:
    case = make_case("all")
    targets = torch.arange(SEQUENCE * BATCH) * 41 % VOCAB
    targets[::5] = -1
    own = slice(None)
    if spread:
        size = SEQUENCE * BATCH // int(tp)
        own = slice(size * dist.get_rank(groups[tp]), size * (dist.get_rank(groups[tp]) + 1))
    scores = linear_token_scores(
        case["student_hidden"].flatten(0, 1)[own],
        shard(case["student_head"], groups, tp, 0),
        case["teacher_hidden"].flatten(0, 1)[own],
        shard(case["teacher_head"], groups, tp, 0),
        targets,
        student_stop_token_ids=STOPS[0],
        teacher_stop_token_ids=STOPS[1],
        group=groups[tp],
        vocab_size=VOCAB,
        scratch_bytes=50_000,
        sequence_parallel=spread,
    )
    fields = {name: value for name, value in vars(scores).items() if name != "statistics"}
    return {name: value.numpy() for name, value in (fields | vars(scores.statistics)).items()}


@pytest.mark.parametrize("tp", ["2", "4"])
def test_scores(ranks: Ranks, tp: str) -> None:
    whole, spread = ranks.run(scores_on_rank, tp, False), ranks.run(scores_on_rank, tp, True)
    assert whole[0]["student_log_prob"].any() and not whole[0]["student_log_prob"][::5].any()
    for one, other in zip(whole, spread, strict=True):
        for name in one:  # other chunks, whose products sum in another order
            np.testing.assert_allclose(one[name], other[name], rtol=2e-6, atol=2e-6)
