"""The pool of ranks itself: results, errors, ranks that hang or die."""

from __future__ import annotations

import os
import signal
import time
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


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    dist.destroy_process_group()


def process() -> int:
    return os.getpid()


def test_every_rank_answers(ranks: RankPool) -> None:
    assert ranks.run(sum_of_ranks, 3) == [3.0, 3.0]


def test_an_error_of_all_is_told_and_the_ranks_live_on(ranks: RankPool) -> None:
    before = ranks.run(process)
    with pytest.raises(AssertionError, match="rank 0 fails"):
        ranks.run(fail_everywhere)
    assert ranks.run(sum_of_ranks, factor=1) == [1.0, 1.0]
    assert ranks.run(process) == before


def test_an_error_of_one_is_told_though_the_others_wait_for_it(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="one of us fails"):
        ranks.run(fail_on, 1)
    assert ranks.run(sum_of_ranks, 2) == [2.0, 2.0]


def test_a_group_that_was_taken_down_is_there_for_the_next(ranks: RankPool) -> None:
    before = ranks.run(process)
    ranks.run(leave)
    assert ranks.run(sum_of_ranks, 2) == [2.0, 2.0]
    assert ranks.run(process) == before


def test_a_rank_that_dies_is_told_and_new_ones_start(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 raised:\n\(the process died with exit code -9\)"):
        ranks.run(die_on, 1)
    assert ranks.run(sum_of_ranks, 2) == [2.0, 2.0]


def test_a_rank_that_hangs_is_told_and_new_ones_start() -> None:
    with RankPool(2, timeout=30) as ranks:
        before = ranks.run(process)
        ranks.timeout = 0.5
        with pytest.raises(AssertionError, match=r"ranks \[1\] did not answer in time"):
            ranks.run(hang_on, 1)
        ranks.timeout = 30
        assert not set(ranks.run(process)) & set(before)


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
