"""Packing against a naive reference that walks over the tokens one by one, at any layout."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.models.zigzag import held
from megatron_sead.prompts.packing import MicroBatch, TokenView, pack
from megatron_sead.prompts.sharing import deal, share_by_tokens

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


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([2, 3, 4]), st.booleans())
def test_ranks_that_share_sequences_hold_each_token_once(data: st.DataObject, ranks: int, packed: bool) -> None:
    """Put together they are the sequences, each padded for itself; each response token is predicted on one rank."""
    count = data.draw(st.integers(1, 5))
    student, responses = (data.draw(st.lists(tokens, min_size=count, max_size=count)) for _ in range(2))
    multiple = ranks * 4
    shares = [
        pack(
            student,
            student,
            responses,
            [True] * count,
            micro_batch_size=count,
            data_parallel_rank=0,
            data_parallel_size=1,
            length_multiple=multiple,
            pad_token_id=PAD,
            device=torch.device("cpu"),
            micro_batch_tokens=1000 if packed else None,
            share=(rank, ranks),
        )
        for rank in range(ranks)
    ]
    assert {len(batches) for batches in shares} == {1}
    views = [batches[0].student for batches in shares]
    bounds = views[0].boundaries
    assert bounds is not None
    whole = torch.full((sum(bounds.lengths),), -1)
    predicted: dict[int, int] = {}
    for rank, view in enumerate(views):
        assert view.boundaries is not None
        assert view.boundaries.share == (rank, ranks)
        place = held(bounds.lengths, rank, ranks)
        whole[place] = view.tokens[0]
        own_starts = torch.repeat_interleave(bounds.starts[:-1].long(), torch.tensor(bounds.lengths))[place]
        assert torch.equal(view.boundaries.positions, place - own_starts)
        assert view.own is not None
        told = place[view.predictors].tolist()
        assert not predicted.keys() & set(view.own.tolist())
        predicted |= dict(zip(view.own.tolist(), told, strict=True))
    batch = shares[0][0]
    order = list(dict.fromkeys(batch.rollout_index.tolist()))
    for rollout, sequence in zip(order, whole.split(bounds.lengths), strict=True):
        text = student[rollout] + responses[rollout]
        assert tuple(sequence.tolist()) == text + (PAD,) * (len(sequence) - len(text))
    assert len(whole) % multiple == 0
    assert all(length % (2 * ranks) == 0 for length in bounds.lengths)
    assert sorted(predicted) == list(range(len(batch.targets)))
    assert all(whole[predicted[i] + 1] == target for i, target in enumerate(batch.targets.tolist()))


@dataclass(frozen=True)
class Budget:
    tokens: int
    ranks: int
    multiple: int  # of a view's length
    count_multiple: int  # of the number of a rank's micro-batches


def pack_all_by_tokens(
    student: Sequences, teacher: Sequences, responses: Sequences, budget: Budget
) -> list[list[MicroBatch]]:
    return [
        pack(
            student,
            teacher,
            responses,
            [i % 3 != 0 for i in range(len(responses))],
            micro_batch_size=1,
            data_parallel_rank=rank,
            data_parallel_size=budget.ranks,
            length_multiple=budget.multiple,
            pad_token_id=PAD,
            device=torch.device("cpu"),
            log_probs=[None if i % 2 else (-float(i),) * len(response) for i, response in enumerate(responses)],
            micro_batch_tokens=budget.tokens,
            count_multiple=budget.count_multiple,
        )
        for rank in range(budget.ranks)
    ]


@settings(deadline=None, max_examples=120)
@given(st.data(), st.sampled_from([16, 19, 40, 1000]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 4]))
def test_packed_rollouts_are_each_a_sequence_of_their_own(
    data: st.DataObject, tokens_of_one: int, ranks: int, multiple: int
) -> None:
    """Whatever the lengths: 14 tokens at most, of which a budget of 16 holds one rollout, and one of 1000 all."""
    budget = Budget(tokens_of_one, ranks, multiple, data.draw(st.sampled_from([1, 2])))
    count = data.draw(st.integers(ranks, 9))
    student, teacher, responses = (data.draw(st.lists(tokens, min_size=count, max_size=count)) for _ in range(3))
    by_rank = pack_all_by_tokens(student, teacher, responses, budget)
    (number,) = {len(micro_batches) for micro_batches in by_rank}
    assert number % budget.count_multiple == 0
    seen: dict[tuple[int, int], tuple[int, bool]] = {}
    for micro_batches in by_rank:
        assert len(micro_batches[0].targets)
        for batch in micro_batches:
            rollouts = list(dict.fromkeys(batch.rollout_index.tolist()))
            for prompts, view in ((student, batch.student), (teacher, batch.teacher)):
                check_packed([prompts[i] + responses[i] for i in rollouts], view, budget)
            told = zip(batch.rollout_index.tolist(), batch.position.tolist(), batch.targets.tolist(), strict=True)
            assert batch.sampled_log_prob is not None
            for i, (rollout, position, target) in enumerate(told):
                for prompts, view in ((student, batch.student), (teacher, batch.teacher)):
                    check_predictor(view, int(view.predictors[i]), prompts[rollout] + responses[rollout][:position])
                said = batch.sampled_log_prob[i].item()
                assert said == -float(rollout) if rollout % 2 == 0 else said != said
                assert (rollout, position) not in seen
                seen[rollout, position] = (target, bool(batch.valid[i]))
    assert seen == {
        (i, j): (token, i % 3 != 0) for i, response in enumerate(responses) for j, token in enumerate(response)
    }


def check_packed(sequences: Sequences, view: TokenView, budget: Budget) -> None:
    """The sequences one after another, padding at the end alone, and boundaries around each."""
    line, bounds = view.tokens[0].tolist(), view.boundaries
    assert bounds is not None
    assert len(line) <= budget.tokens
    assert len(line) % budget.multiple == 0
    whole = [token for sequence in sequences for token in sequence]
    assert line == whole + [PAD] * (len(line) - len(whole))
    assert len(line) - len(whole) < budget.multiple or not sequences
    assert bounds.starts.dtype == torch.int32
    assert bounds.starts.tolist() == [sum(bounds.lengths[:i]) for i in range(len(bounds.lengths) + 1)]
    assert sum(bounds.lengths) == len(line)
    assert list(bounds.lengths[:-1]) == [len(sequence) for sequence in sequences[:-1]]
    assert len(bounds.lengths) == max(1, len(sequences))
    assert bounds.positions.tolist() == [place for length in bounds.lengths for place in range(length)]


def check_predictor(view: TokenView, predictor: int, before: tuple[int, ...]) -> None:
    """It is in its own sequence, and sees there what comes before its token."""
    assert view.boundaries is not None
    start = max(begin for begin in view.boundaries.starts.tolist() if begin <= predictor)
    assert tuple(view.tokens[0, start : predictor + 1].tolist()) == before


def test_micro_batches_of_all_ranks_are_about_as_long() -> None:
    """As in training: mean 2,000 tokens, one in a hundred over 16,384; the budget is the longest that there may be."""
    draw = random.Random(0)
    lengths = [min(18432, int(draw.lognormvariate(6.95, 1.18)) + 100) for _ in range(96)]
    loads = [
        sum(lengths[i] for i in items) for rank in range(4) for items in share_by_tokens(lengths, 18432, rank, 4, 1)
    ]
    assert sum(loads) == sum(lengths)
    assert len(loads) == 4 * -(-sum(lengths) // (4 * 18432))
    loads.sort()
    assert loads[-1] == max(lengths) == 18432  # alone
    assert loads[-2] < 1.01 * loads[0]


def test_ranks_that_need_fewer_micro_batches_get_as_many() -> None:
    """Five rollouts that fill a micro-batch each, on two ranks: three on one, two and an empty one on the other."""
    rollouts: Sequences = [(1, 2, 3, 4)] * 5
    first, second = pack_all_by_tokens([(9,)] * 5, [(9,)] * 5, rollouts, Budget(5, 2, 1, 1))
    assert [len(batch.targets) for batch in first] == [4, 4, 4]
    assert [len(batch.targets) for batch in second] == [4, 4, 0]
    empty = second[-1]
    assert empty.student.tokens.tolist() == [[PAD]]
    assert empty.teacher is empty.student


def test_the_longer_view_fills_the_budget() -> None:
    """A teacher that sees 5 tokens more: three rollouts of 4 and 9 tokens, of which 20 hold two."""
    by_student, by_teacher = [(1, 2)] * 3, [(1, 2, 3, 4, 5, 6, 7)] * 3
    for student, teacher in ((by_student, by_teacher), (by_teacher, by_student)):
        (batches,) = pack_all_by_tokens(student, teacher, [(8, 9)] * 3, Budget(20, 1, 1, 1))
        assert sorted(max(b.student.tokens.shape[1], b.teacher.tokens.shape[1]) for b in batches) == [9, 18]


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [
        ([3, 9], Budget(9, 1, 1, 1), "a rollout has 10 tokens: training.micro_batch_tokens holds 9"),
        ([3, 9], Budget(11, 1, 4, 1), "a rollout has 10 tokens: training.micro_batch_tokens holds 8"),
        ([3], Budget(9, 2, 1, 1), "1 rollouts are fewer than 2 data-parallel ranks"),
        ([3, 0], Budget(9, 2, 1, 1), "holds no token"),
    ],
)
def test_what_no_budget_holds_is_refused(lengths: list[int], budget: Budget, message: str) -> None:
    prompts: Sequences = [(1,)] * len(lengths)
    with pytest.raises(ValueError, match=message):
        pack_all_by_tokens(prompts, prompts, [(1,) * length for length in lengths], budget)


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
