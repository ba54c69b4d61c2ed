"""Both models' likeliest tokens over a vocabulary and a sequence that ranks share, against whole logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sead.distillation import linear_likeliest_tokens
from tests.distillation.ranks import Groups, Ranks
from tests.distillation.reference import pad
from tests.distillation.test_tensor_parallel import VOCAB_SIZES, make_case, shard

TOKENS, K = 12, 3  # of the case's 15, so that ranks share the sequence evenly
WANTED = {"all": torch.ones(TOKENS, dtype=torch.bool), "some": torch.arange(TOKENS) % 5 == 1}
WANTED["none"] = torch.zeros(TOKENS, dtype=torch.bool)


def hidden(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    case = make_case(vocab_size)
    return case.student_hidden.flatten(0, 1)[:TOKENS], case.teacher_hidden.flatten(0, 1)[:TOKENS]


def on_rank(groups: Groups, tp: str, vocab_size: int, wanted: str, sequence_parallel: bool) -> list[Any]:
    case, states = make_case(vocab_size), hidden(vocab_size)
    if sequence_parallel:
        states = tuple(state.chunk(int(tp))[dist.get_rank(groups[tp])] for state in states)
    found = linear_likeliest_tokens(
        (states[0], shard(case.student_head, groups, tp, 0)),
        (states[1], shard(case.teacher_head, groups, tp, 0)),
        WANTED[wanted],
        K,
        group=groups[tp],
        vocab_size=vocab_size,
        scratch_bytes=60_000,  # several chunks
        sequence_parallel=sequence_parallel,
    )
    return [value.numpy() for value in (found.ids, found.student_log_prob, found.teacher_log_prob)]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize(
    ("tp", "wanted", "sequence_parallel"),
    [("1", "all", False), ("2", "some", False), ("4", "all", False), ("4", "some", True), ("2", "none", True)],
)
def test_likeliest_tokens(ranks: Ranks, tp: str, wanted: str, sequence_parallel: bool, vocab_size: int) -> None:
    case = make_case(vocab_size)
    logits = [
        (states.double() @ head.double().t()).log_softmax(-1)
        for states, head in zip(hidden(vocab_size), (case.student_head, case.teacher_head), strict=True)
    ]
    best = torch.stack([model.topk(K).indices for model in logits], dim=1)
    asked = WANTED[wanted][:, None, None]
    for ids, *log_probs in ranks.run(on_rank, tp, vocab_size, wanted, sequence_parallel):
        assert torch.equal(torch.from_numpy(ids), torch.where(asked, best, 0))
        for found, model in zip(log_probs, logits, strict=True):
            expected = torch.where(asked, model[:, None].expand(-1, 2, -1).gather(2, best), 0.0)
            torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=2e-6, atol=2e-6)


def test_of_equal_logits_the_lowest_token_comes_first() -> None:
    states, head = torch.ones(1, 2), pad(torch.ones(6, 2), 8, 0)
    found = linear_likeliest_tokens((states, head), (states, head), torch.ones(1, dtype=torch.bool), 6, vocab_size=6)
    assert found.ids[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(found.teacher_log_prob.exp(), torch.full((1, 2, 6), 1 / 6))
