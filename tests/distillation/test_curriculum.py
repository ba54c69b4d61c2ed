"""Which prompts are open, that batches are functions of (seed, step, state), and that a resume goes on exactly."""

from __future__ import annotations

import logging
import math
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.distillation import Curriculum
from megatron_sead.distillation.curriculum import MODES

LADDER = [index / 99 for index in range(100)]
STEPS, BATCH = 40, 8


def curriculum(difficulties: list[float | None] | list[float] = LADDER, **changes: Any) -> Curriculum:
    return Curriculum(
        difficulties, **({"batch_size": BATCH, "total_steps": STEPS, "seed": 3, "c0": 0.25, "k": 2} | changes)
    )


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(MODES), seed=st.integers(0, 2**40), step=st.integers(0, 100))
def test_a_batch_is_a_function_of_seed_and_step(mode: str, seed: int, step: int) -> None:
    one, other = curriculum(mode=mode, seed=seed), curriculum(mode=mode, seed=seed)
    for earlier in range(3):
        one.next_batch(earlier)  # what was asked before does not matter
    batch = one.next_batch(step)
    assert batch == one.next_batch(step) == other.next_batch(step)
    assert len(set(batch)) == BATCH and set(batch) <= set(range(100))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "sorted"])
def test_steps_and_seeds_differ(mode: str) -> None:
    asked = curriculum(mode=mode)
    assert asked.next_batch(0) != asked.next_batch(1) != curriculum(mode=mode, seed=4).next_batch(1)


@pytest.mark.parametrize(("mode", "opened"), [("gated", 60), ("competence_cdf", 72), ("none", 100)])
def test_draws_are_those_of_a_list_of_the_open_prompts(mode: str, opened: int) -> None:
    """However they are found: a run is resumed with the batches that it would have had."""
    order = list(range(100))
    Random("3/ties").shuffle(order)
    order = sorted(order, key=[index // 10 for index in range(100)].__getitem__)
    asked = curriculum([index // 10 / 9 for index in range(100)], mode=mode)
    count = asked.eligible_count(20)
    assert count == opened
    assert asked.next_batch(20) == Random("3/batch/20").sample(order[:count], BATCH)
    assert asked.eligible_difficulty(20) == pytest.approx(sum(index // 10 / 9 for index in order[:count]) / count)


def test_a_step_costs_the_same_whatever_the_number_of_prompts() -> None:
    """Counted in the prompts that it looks at."""

    class Looked(list[float]):
        times = 0

        def __getitem__(self, index: Any) -> Any:
            Looked.times += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            Looked.times += len(self)
            return super().__iter__()

    for mode in MODES:
        asked = curriculum(Looked(index / 1999 for index in range(2000)), mode=mode)
        Looked.times = 0
        asked.next_batch(3), asked.eligible_count(3), asked.eligible_difficulty(3)
        assert Looked.times <= 2 * BATCH, mode


def test_gate_opens_as_in_algorithm_1() -> None:
    asked = curriculum()
    for step in range(STEPS + 1):
        gate = min(1, 0.25 * (1 + step / STEPS) ** 2)
        assert asked.eligible_count(step) == sum(difficulty <= gate for difficulty in LADDER)
        assert all(LADDER[index] <= gate for index in asked.next_batch(step))
    assert asked.eligible_count(0) == 25 and asked.eligible_count(STEPS) == 100


def test_gate_admits_uniformly() -> None:
    counts = Counter(index for step in range(4000) for index in curriculum(total_steps=10**9).next_batch(step))
    assert set(counts) == set(range(25))
    assert all(abs(count - 4000 * BATCH / 25) < 5 * math.sqrt(4000 * 8 / 25) for count in counts.values())


def test_a_gate_that_stays_locked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"c0=0.2, k=2: c0 \* 2\^k is 0.8, under 1"):
        curriculum(c0=0.2)
    curriculum(c0=0.2, mode="none")


def test_a_narrow_gate_is_widened_to_the_easiest_batch(caplog: pytest.LogCaptureFixture) -> None:
    asked = curriculum([0.1, 0.2, *[0.9] * 5, *[0.5] * 6])
    with caplog.at_level(logging.WARNING):
        assert asked.eligible_count(0) == BATCH
        assert sorted(asked.next_batch(0)) == [0, 1, *range(7, 13)]
        asked.next_batch(1)
    assert len(caplog.records) == 1 and "step 0 admits: 2, fewer" in caplog.text


def test_sorted_is_one_pass_from_easy_to_hard(caplog: pytest.LogCaptureFixture) -> None:
    asked = curriculum(mode="sorted")
    with caplog.at_level(logging.INFO):
        batches = [asked.next_batch(step) for step in range(12)]
        assert not caplog.records
        assert sorted(index for batch in [*batches, asked.next_batch(12)[:4]] for index in batch) == list(range(100))
        assert caplog.text.count("another pass") == 1 and "step 12" in caplog.text
    order = [index for batch in batches for index in batch]
    assert order != sorted(order)  # noise
    # sd 0.02 is 2 places of the ladder: 5 sigma of a difference of two is 14
    assert all(abs(place - index) < 15 for place, index in enumerate(order))
    assert curriculum(mode="sorted", noise=0.0).next_batch(1) == list(range(8, 16))
    assert asked.next_batch(12)[4:] == batches[0][:4]
    assert [asked.eligible_count(step) for step in (0, 1, 12, 13)] == [100, 92, 4, 96]
    assert asked.eligible_difficulty(12) > asked.eligible_difficulty(0) == pytest.approx(sum(LADDER) / 100)


def test_sorted_tells_of_a_pass_that_begins_with_a_step(caplog: pytest.LogCaptureFixture) -> None:
    asked = curriculum(LADDER[:16], mode="sorted")
    with caplog.at_level(logging.INFO):
        for step in range(4):
            asked.next_batch(step)
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [2]


def test_competence_over_difficulty_ranks() -> None:
    crowded = [0.0] * 60 + [0.9] * 40
    asked = curriculum(crowded, mode="competence_cdf", c0=0.1)
    for step in (0, 10, 20, STEPS):
        expected = math.floor(100 * math.sqrt(step * (1 - 0.01) / STEPS + 0.01))
        assert asked.eligible_count(step) == max(BATCH, expected)
    assert set(asked.next_batch(0)) <= set(range(60))


def mastery(**changes: Any) -> Curriculum:
    return curriculum(mode="mastery", patience=5, smoothing=0.5, mastery_threshold=0.7, **changes)


def tier_of(index: int) -> int:
    return index // 25


def test_mastery_opens_a_tier_when_the_open_ones_are_solved() -> None:
    asked = mastery(replay_share=0.25)
    assert {tier_of(index) for index in asked.next_batch(0)} == {0}
    asked.update([(0, True), (1, False)])
    assert asked.eligible_count(1) == 25
    asked.update([(0, True), (1, True)])  # smoothed 0.75
    assert asked.eligible_count(2) == 50
    assert Counter(tier_of(index) for index in asked.next_batch(2)) == {1: 6, 0: 2}
    asked.update([(0, True), (1, False)])  # the average began anew
    assert asked.eligible_count(3) == 50


def test_mastery_loses_patience() -> None:
    asked, counts = mastery(), []
    for step in range(25):
        counts.append(asked.eligible_count(step))
        asked.update([(index, False) for index in asked.next_batch(step)])
    assert counts == [25] * 5 + [50] * 5 + [75] * 5 + [100] * 10


def test_mastery_tiers_smaller_than_a_batch() -> None:
    asked = mastery(batch_size=30)
    assert len(set(asked.next_batch(0))) == 30
    asked.update([(0, True)])
    assert len(set(asked.next_batch(1))) == 30 and asked.eligible_count(1) == 50


@pytest.mark.parametrize("mode", MODES)
def test_a_resume_continues_exactly(mode: str) -> None:
    def ask(asked: Curriculum, steps: range) -> list[list[int]]:
        batches = []
        for step in steps:
            batch = asked.next_batch(step)
            asked.update([(index, (index * 7 + step) % 3 > 0) for index in batch])
            batches.append(batch)
        return batches

    settings = {"mode": mode, "patience": 4, "tiers": 5}
    whole, first, second = (curriculum(**settings) for _ in range(3))
    expected = ask(whole, range(STEPS))
    ask(first, range(17))
    second.load_state_dict(first.state_dict())
    assert ask(second, range(17, STEPS)) == expected[17:]


def test_unsolved_prompts_can_be_left_out() -> None:
    asked = curriculum([0.1] * 10 + [1.0] * 10, mode="none", drop_unsolved=True)
    assert asked.eligible_count(0) == 10
    assert all(index < 10 for step in range(20) for index in asked.next_batch(step))


def test_unknown_difficulties() -> None:
    unknown = [*LADDER, None]
    assert curriculum(unknown, mode="none").eligible_count(0) == 101
    for changes in ({"mode": mode} for mode in MODES if mode != "none"):
        with pytest.raises(ValueError, match=r"1 of 101 prompts .* number 100.*sead difficulty"):
            curriculum(unknown, **changes)
    with pytest.raises(ValueError, match="no difficulty"):
        curriculum(unknown, mode="none", drop_unsolved=True)


@pytest.mark.parametrize(
    ("difficulties", "changes", "message"),
    [
        (LADDER, {"mode": "gate"}, "curriculum mode 'gate': must be one of gated, sorted"),
        (LADDER[:7], {}, "batch of 8 different prompts: must be from 1 to 7"),
        ([1.0] * 10, {"drop_unsolved": True}, "without the unsolved"),
        ([*LADDER, 1.5], {}, "difficulty 1.5 of prompt number 100"),
        ([*LADDER, float("nan")], {}, "difficulty nan of prompt number 100"),
    ],
)
def test_bad_values_are_refused(difficulties: list[float], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curriculum(difficulties, **changes)
