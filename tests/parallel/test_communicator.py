"""Shapes of pipeline messages, which no message tells."""

from __future__ import annotations

import pytest

from megatron_sead.parallel.communicator import received_shapes

SHAPES = [(length, 1, 8) for length in range(1, 7)]


def lengths(stages: int, chunks: int) -> list[int]:
    return [length for length, _, _ in received_shapes(SHAPES, stages, chunks)]


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_without_virtual_stages_micro_batches_come_in_their_order(stages: int) -> None:
    assert lengths(stages, 1) == [1, 2, 3, 4, 5, 6]


def test_virtual_stages_receive_as_many_micro_batches_as_there_are_stages_chunk_by_chunk() -> None:
    assert lengths(2, 2) == [1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6]
    assert lengths(3, 3) == [1, 2, 3] * 3 + [4, 5, 6] * 3


def test_a_chunk_at_the_end_of_the_pipeline_receives_nothing_from_there() -> None:
    assert lengths(2, 0) == []
