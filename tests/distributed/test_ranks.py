"""The pool of ranks itself: results, errors, hanging ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints.training import train
from tests.distributed.ranks import RankPool
from tests.models.parity import Layout

THREADS = Path("/proc/self/task")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2, timeout=60) as pool:
        yield pool


def sum_of_ranks(factor: int) -> float:
    total = torch.tensor([float(dist.get_rank() * factor)])
    dist.all_reduce(total)
    return total.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("one of us fails")
    dist.barrier()


def fail_everywhere() -> None:
    raise ValueError(f"rank {dist.get_rank()} fails")


def test_every_rank_answers(ranks: RankPool) -> None:
    assert ranks.run(sum_of_ranks, 3) == [3.0, 3.0]


def test_an_error_of_all_is_told_and_the_ranks_live_on(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="rank 0 fails"):
        ranks.run(fail_everywhere)
    assert ranks.run(sum_of_ranks, factor=1) == [1.0, 1.0]


def test_an_error_of_one_is_told_though_the_others_wait_for_it(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="one of us fails"):
        ranks.run(fail_on, 1)
    assert ranks.run(sum_of_ranks, 2) == [2.0, 2.0]


def count_threads() -> int:
    return len(list(THREADS.iterdir()))


@pytest.mark.mcore_lane
@pytest.mark.skipif(not THREADS.exists(), reason=f"{THREADS} is Linux's")
def test_training_leaves_no_threads(ranks: RankPool, tiny_olmo3: Path, tmp_path: Path) -> None:
    counts = []
    for run in range(3):
        ranks.run(train, tiny_olmo3, Layout(), tmp_path / str(run))
        counts.append(ranks.run(count_threads))
    assert counts[1] == counts[2], counts  # the first starts some that serve every run
