"""Terms of a plan's memory that a formula has and a traced step of few tokens would not show."""

from __future__ import annotations

import pytest

from megatron_sead.planning.activations import Batch
from megatron_sead.planning.host import Saving, pinned, saving


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        (Batch(1, 64, 4, 12, packed=True), 8),
        (Batch(1, 40, 4, 12, packed=True), 4),  # two rollouts of 16 and one of 8
        (Batch(3, 16, 5, 11, packed=False), 4),
        (Batch(1, 48, 1, 46, packed=False), 2),  # a row with padding
    ],
    ids=str,
)
def test_response_tokens_are_counted_where_they_are_predicted(batch: Batch, parts: int) -> None:
    length = batch.prompt + batch.response
    predicting = [0] * batch.length
    for start in range(0, batch.length if batch.packed else 1, length):
        end = min(start + length, batch.length)
        prompt = max(1, (end - start) * batch.prompt // length)
        for place in range(start + prompt - 1, end - 1):
            predicting[place] += batch.rows
    size = batch.length // parts
    assert batch.responses_by_part(parts) == [sum(predicting[p * size : (p + 1) * size]) for p in range(parts)]
    assert batch.responses == sum(predicting)


def test_a_save_gathers_a_bucket_on_the_gpu_and_all_of_a_ranks_state_on_the_host() -> None:
    whole, weights = 12 * 100, 2 * 100
    expected = Saving(4 * (100 + 25), whole + whole + weights, whole + 4 * (3 * 25 + 2 * 100))
    assert saving([[60, 40]], 2, 4, distributed=True, in_buckets=False) == expected
    assert saving([[60, 40]], 2, 4, distributed=False, in_buckets=False) == Saving(0, weights + whole, 0)
    chunks = saving([[60], [40]], 4, 4, distributed=True, in_buckets=False)
    assert chunks.gpu == 4 * (60 + 15)


def test_buckets_of_gradients_are_as_large_as_megatron_makes_them() -> None:
    """Filled from the last parameter on, and closed when they hold 40 million elements."""
    million = 10**6
    sizes = [50 * million, 30 * million, 20 * million, 15 * million]
    assert saving([sizes], 2, 2, distributed=True, in_buckets=True).gpu == 4 * (65 + 32.5) * million
    assert saving([sizes], 2, 2, distributed=True, in_buckets=False).gpu == 4 * (115 + 57.5) * million


def test_pinned_memory_is_a_power_of_two() -> None:
    assert [pinned(size) for size in (0, 1, 3, 4, 5)] == [0, 1, 4, 4, 8]
