"""Packing against a naive reference that walks over the tokens one by one, at any layout."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.prompts.packing import MicroBatch, TokenView, deal, pack

PAD = 0
Sequences = list[tuple[int, ...]]


def pack_all(
    student: Sequences, teacher: Sequences, responses: Sequences, *, micro: int = 1, ranks: int = 1, multiple: int = 1
) -> list[list[MicroBatch]]:
    valid = [i % 3 != 0 for i in range(len(responses))]
    return [
        pack(
            student,
            teacher,
            responses,
            valid,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            length_multiple=multiple,
            pad_token_id=PAD,
            device=torch.device("cpu"),
        )
        for rank in range(ranks)
    ]


tokens = st.lists(st.integers(1, 50), min_size=1, max_size=7).map(tuple)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([1, 4]))
def test_every_token_is_predicted_from_what_comes_before_it(
    data: st.DataObject, micro: int, ranks: int, multiple: int
) -> None:
    count = micro * ranks * data.draw(st.integers(1, 3))
    student, teacher, responses = (data.draw(st.lists(tokens, min_size=count, max_size=count)) for _ in range(3))
    seen: dict[tuple[int, int], tuple[int, bool]] = {}
    by_rank = pack_all(student, teacher, responses, micro=micro, ranks=ranks, multiple=multiple)
    assert len({len(micro_batches) for micro_batches in by_rank}) == 1
    for batch in (batch for micro_batches in by_rank for batch in micro_batches):
        for prompts, view in ((student, batch.student), (teacher, batch.teacher)):
            check_view(prompts, responses, batch, view, multiple)
        for rollout, position, target, valid in zip(
            *(t.tolist() for t in (batch.rollout_index, batch.position, batch.targets, batch.valid)), strict=True
        ):
            assert (rollout, position) not in seen
            seen[rollout, position] = (target, valid)
    assert seen == {
        (i, j): (token, i % 3 != 0) for i, response in enumerate(responses) for j, token in enumerate(response)
    }


def check_view(prompts: Sequences, responses: Sequences, batch: MicroBatch, view: TokenView, multiple: int) -> None:
    """Up to and with a predictor stand the prompt and the response before the token; the token follows."""
    padded = view.tokens.shape[1]
    longest = 0
    for rollout, position, predictor in zip(
        batch.rollout_index.tolist(), batch.position.tolist(), view.predictors.tolist(), strict=True
    ):
        row, column = divmod(predictor, padded)
        line = view.tokens[row].tolist()
        assert tuple(line[: column + 1]) == prompts[rollout] + responses[rollout][:position]
        assert line[column + 1] == responses[rollout][position]
        whole = prompts[rollout] + responses[rollout]
        assert tuple(line) == whole + (PAD,) * (padded - len(whole))
        longest = max(longest, len(whole))
    assert padded % multiple == 0
    assert longest <= padded < longest + multiple


def test_ranks_get_like_amounts() -> None:
    draw = random.Random(0)
    lengths = [int(draw.lognormvariate(7, 1)) for _ in range(96)]  # as responses are: a few are ten times the usual
    shares = [deal(lengths, rank, 4) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == list(range(96))
    totals = [sum(lengths[i] for i in share) for share in shares]
    in_turns = [sum(sorted(lengths, reverse=True)[rank::4]) for rank in range(4)]
    assert max(totals) - min(totals) < 0.4 * (max(in_turns) - min(in_turns))


def test_equal_lengths_keep_their_order() -> None:
    assert deal([5, 7, 5, 7], 0, 1) == [1, 3, 0, 2]


def test_rows_of_a_micro_batch_are_of_like_length() -> None:
    responses = [(9,) * n for n in (1, 30, 2, 29)]
    batches = pack_all([(1,)] * 4, [(1,)] * 4, responses, micro=2)[0]
    assert [batch.student.tokens.shape[1] for batch in batches] == [31, 3]


@pytest.mark.parametrize(
    ("responses", "message"),
    [([(1,)] * 3, "multiple of 2"), ([], "multiple of 2"), ([(1,), ()], "holds no token")],
)
def test_what_cannot_be_packed_is_refused(responses: Sequences, message: str) -> None:
    prompts: Sequences = [(1,)] * len(responses)
    with pytest.raises(ValueError, match=message):
        pack_all(prompts, prompts, responses, micro=2)
