"""Zones by count, whatever the ties and the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.distillation import (
    RunningThresholds,
    Thresholds,
    assign_zones,
    assign_zones_by_threshold,
    assign_zones_per_sequence,
    rescue_confident_errors,
    zones_and_thresholds,
)
from tests.distillation.ranks import Groups, Ranks

ALL_SHARES = [(50, 40, 10), (0, 50, 50), (100, 0, 0), (0, 0, 100), (33.3, 33.3, 33.4), (80, 10, 10)]


def tokens(seed: int, count: int, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """H_s, H_t with ties (few levels), which tokens are valid, and a shuffled unique index."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randint(levels, (count,), generator=generator) / levels for _ in range(2))
    valid = torch.rand(count, generator=generator) < 0.8
    return student, teacher, valid, torch.randperm(count, generator=generator) * 1000 + (1 << 40)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 300),
    levels=st.sampled_from([1, 3, 1000]),
    shares=st.sampled_from(ALL_SHARES),
)
def test_shares_are_exact_and_nested(seed: int, count: int, levels: int, shares: tuple[float, float, float]) -> None:
    student, teacher, valid, index = tokens(seed, count, levels)
    zones = assign_zones(student, teacher, valid, shares=shares, token_index=index)
    assert zones.dtype == torch.int8 and torch.equal(zones == -1, ~valid)
    total = int(valid.sum())
    for zone, share in enumerate(shares):
        assert abs(int((zones == zone).sum()) - share / 100 * total) <= 1
    a, b, c = (zones == zone for zone in range(3))
    if c.any() and (a | b).any():
        assert teacher[c].min() >= teacher[a | b].max()
    if a.any() and b.any():
        assert student[b].min() >= student[a].max()


def test_paper_shares_of_a_round_number() -> None:
    student, teacher, _, index = tokens(0, 1000, 7)
    zones = assign_zones(student, teacher, torch.ones(1000, dtype=torch.bool), token_index=index)
    assert [(zones == zone).sum().item() for zone in range(3)] == [500, 400, 100]


def test_of_equal_entropies_the_lower_index_gets_the_higher_zone() -> None:
    index = torch.tensor([50, 10, 40, 20, 30, 5, 6, 7, 8, 9])
    same, valid = torch.ones(10), torch.ones(10, dtype=torch.bool)
    assert assign_zones(same, same, valid, token_index=index).tolist() == [0, 0, 0, 0, 0, 2, 1, 1, 1, 1]
    assert assign_zones(same, same, valid).tolist() == [2, 1, 1, 1, 1, 0, 0, 0, 0, 0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 4, 1000]))
def test_order_of_tokens_does_not_matter(seed: int, levels: int) -> None:
    student, teacher, valid, index = tokens(seed, 120, levels)
    zones = assign_zones(student, teacher, valid, token_index=index)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(
        zones[order], assign_zones(student[order], teacher[order], valid[order], token_index=index[order])
    )


SPLITS = [[25, 25, 25, 25], [97, 0, 2, 1], [0, 0, 0, 100], [40, 10, 30, 20]]


def zones_on_rank(groups: Groups, names: list[str], split: list[int], levels: int) -> tuple[list[int], list[float]]:
    columns = [part.split(split)[torch.distributed.get_rank()] for part in tokens(0, 100, levels)]
    over = [groups[name] for name in names]
    zones = assign_zones(*columns[:3], groups=over, token_index=columns[3])
    found = zones_and_thresholds(*columns[:3], groups=over, token_index=columns[3])[1]
    return zones.tolist(), [found.teacher, found.student]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("names", [["4"], ["2", "columns"], ["columns", "2"]])
def test_ranks_agree_with_one_process(ranks: Ranks, names: list[str], split: list[int]) -> None:
    for levels in (3, 1000):
        student, teacher, valid, index = tokens(0, 100, levels)
        zones = assign_zones(student, teacher, valid, token_index=index).tolist()
        limits = zones_and_thresholds(student, teacher, valid, token_index=index)[1]
        found = ranks.run(zones_on_rank, names, split, levels)
        assert [zone for rank in found for zone in rank[0]] == zones
        assert all(rank[1] == [limits.teacher, limits.student] for rank in found)


def test_ranks_without_a_valid_token_at_all(ranks: Ranks) -> None:
    assert [rank[0] for rank in ranks.run(zones_on_rank, ["4"], [100, 0, 0, 0], 3)][1:] == [[], [], []]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shares=st.sampled_from(ALL_SHARES))
def test_thresholds_give_the_zones_where_nothing_ties(seed: int, shares: tuple[float, float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randperm(90, generator=generator) / 90, torch.randperm(90, generator=generator) / 90
    valid = torch.rand(90, generator=generator) < 0.8
    limits = zones_and_thresholds(student, teacher, valid, shares=shares)[1]
    zones = assign_zones(student, teacher, valid, shares=shares)
    assert torch.equal(assign_zones_by_threshold(student, teacher, valid, limits), zones)


def test_zones_by_absolute_thresholds() -> None:
    zones = assign_zones_by_threshold(
        torch.tensor([0.8, 0.81, 0.0, 2.0, 2.0]),
        torch.tensor([0.0, 0.79, 0.8, 0.8, 0.0]),
        torch.tensor([True, True, True, True, False]),
        Thresholds(teacher=0.8, student=0.8),
    )
    assert zones.tolist() == [0, 1, 2, 2, -1] and zones.dtype == torch.int8


def test_zones_of_each_sequence() -> None:
    student, teacher, valid, _ = tokens(1, 90, 1000)
    rollout = torch.arange(90) % 3  # interleaved, as no layout would be
    zones = assign_zones_per_sequence(student, teacher, valid, rollout)
    for which in range(3):
        own = rollout == which
        assert torch.equal(zones[own], assign_zones(student[own], teacher[own], valid[own]))


def test_rescue_moves_confident_errors_alone() -> None:
    zones = torch.tensor([0, 0, 0, 1, 2, -1], dtype=torch.int8)
    reverse_kl = torch.tensor([0.1, 3.0, torch.inf, 5.0, 5.0, 5.0])
    rescued = rescue_confident_errors(zones, reverse_kl, 2.0)
    assert rescued.tolist() == [0, 1, 1, 1, 2, -1] and rescued.dtype == torch.int8


def test_running_thresholds_follow_and_resume() -> None:
    running = RunningThresholds(decay=0.75)
    assert running.value is None
    running.update(Thresholds(1.0, 0.4))
    assert running.value == Thresholds(1.0, 0.4)
    running.update(Thresholds(2.0, 0.8))
    assert running.value == Thresholds(1.25, 0.5)
    resumed = RunningThresholds(decay=0.75)
    resumed.load_state_dict(running.state_dict())
    for each in (running, resumed):
        each.update(Thresholds(float("inf"), 0.3))  # a step without a zone C tells nothing
        each.update(Thresholds(0.25, 0.5))
    assert running.value == resumed.value == Thresholds(1.0, 0.5)


def test_thresholds_of_no_tokens() -> None:
    nothing = torch.zeros(3)
    assert zones_and_thresholds(nothing, nothing, nothing.bool())[1] == Thresholds(float("inf"), float("-inf"))


@pytest.mark.parametrize("shares", [(50, 40, 11), (-10, 100, 10), (50, 50), (0.5, 0.4, 0.1)])
def test_bad_shares_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares="):
        assign_zones(torch.zeros(2), torch.zeros(2), torch.ones(2), shares=shares)  # type: ignore[arg-type]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"valid has shape \[3\]"):
        assign_zones(torch.zeros(2), torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="token_index"):
        assign_zones(torch.zeros(2), torch.zeros(2), torch.ones(2), token_index=torch.zeros(1))


def test_shares_round_to_the_nearest_token() -> None:
    """Of 17 tokens a tenth is 1.7 and two fifths are 6.8."""
    entropies = torch.arange(17.0)
    zones = assign_zones(entropies, entropies.flip(0), torch.ones(17, dtype=torch.bool))
    assert [int((zones == zone).sum()) for zone in (0, 1, 2)] == [8, 7, 2]
