"""The greatest of all ranks' tokens are those that a sort of all would give, and finding them sends no tokens."""

from __future__ import annotations

import pytest
import torch

from megatron_sead.distillation.selection import greatest
from tests.distillation.ranks import CountedCollectives, Groups, Ranks


def by_sorting(values: torch.Tensor, among: torch.Tensor, count: int, key: torch.Tensor) -> torch.Tensor:
    order = key.argsort()
    order = order[values[order].argsort(descending=True, stable=True)]
    chosen = torch.zeros_like(among)
    chosen[order[among[order]][:count]] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_they_are_those_of_a_sort(dtype: torch.dtype, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    for total in (0, 1, 2, 37, 400):
        values = torch.randint(levels, (total,), generator=generator).to(dtype) / levels * 1e-3
        if dtype == torch.float32:
            values = torch.where(torch.rand(total, generator=generator) < 0.3, -values, values)  # -0 among them
        among, key = torch.rand(total, generator=generator) < 0.7, torch.randperm(total, generator=generator) << 40
        for count in {0, int(among.sum()) // 3, int(among.sum())}:
            assert torch.equal(greatest(values, among, count, key), by_sorting(values, among, count, key))


def sent(groups: Groups, count: int) -> list[int]:
    """Numbers that a rank puts into collectives to choose a tenth of so many tokens a rank."""
    values = torch.rand(count, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    key, among = torch.arange(count) * 4 + torch.distributed.get_rank(), torch.ones(count, dtype=torch.bool)
    with CountedCollectives() as calls:
        greatest(values, among, 4 * count // 10, key, [groups["4"]])
    return [numbers for _, numbers in calls]


def test_what_is_sent_does_not_grow_with_the_tokens(ranks: Ranks) -> None:
    few, many = (ranks.run(sent, count)[0] for count in (100, 20_000))
    assert few == many == [2**10] * 11  # 4 histograms of values, 7 of keys
