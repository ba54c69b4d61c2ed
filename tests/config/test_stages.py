"""Layers by stage: each once, in order, as settings say, and else so that no stage is slower than it must be."""

from __future__ import annotations

from itertools import product

import pytest
from pydantic import ValidationError

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.stages import PipelineSplit, StageLayers, layers_by_stage, student_split, teacher_split
from megatron_sead.errors import UserError


def spread(layers: int, head: float = 0.0, **split: int | None) -> StageLayers:
    return layers_by_stage(layers, PipelineSplit(**split), "a model", head)  # type: ignore[arg-type]


def counts(stages: StageLayers) -> list[int]:
    return [sum(chunks) for chunks in stages]


@pytest.mark.parametrize(
    ("layers", "split", "expected"),
    [
        (4, {}, ((4,),)),
        (32, {"stages": 4}, ((8,),) * 4),
        (64, {"stages": 4, "virtual": 2}, ((8, 8),) * 4),
        (7, {"stages": 3}, ((2,), (2,), (3,))),
        (7, {"stages": 2, "virtual": 2}, ((2, 1), (2, 2))),
        (10, {"stages": 4, "first": 1}, ((1,), (3,), (3,), (3,))),
        (10, {"stages": 4, "last": 1}, ((3,), (3,), (3,), (1,))),
        (10, {"stages": 4, "first": 2, "last": 2}, ((2,), (3,), (3,), (2,))),
        (10, {"stages": 2, "first": 3, "virtual": 3}, ((1, 1, 1), (3, 2, 2))),
        (8, {"stages": 2, "first": 3}, ((3,), (5,))),
    ],
    ids=str,
)
def test_layers_by_stage(layers: int, split: dict[str, int], expected: StageLayers) -> None:
    assert spread(layers, **split) == expected


def test_a_head_takes_layers_off_the_last_stage() -> None:
    assert counts(spread(7, head=2.0, stages=3)) == [3, 3, 1]
    assert counts(spread(7, head=1.0, stages=3)) == [2, 3, 2]
    assert counts(spread(8, head=2.0, stages=4)) == [2, 2, 2, 2]  # it divides: even, unless settings say otherwise


@pytest.mark.parametrize(("stages", "head"), [(2, 0.0), (3, 1.1), (4, 2.0), (5, 0.4)])
def test_no_other_spread_has_a_faster_slowest_stage(stages: int, head: float) -> None:
    def slowest(spread: list[int]) -> float:
        return max([*spread[:-1], spread[-1] + head])

    for layers in range(stages, 12):
        found = counts(spread(layers, head=head, stages=stages))
        others = (o for o in product(range(1, layers + 1), repeat=stages) if sum(o) == layers)
        assert sum(found) == layers
        if layers % stages:
            assert slowest(found) == min(slowest(list(other)) for other in others)


@pytest.mark.parametrize(
    ("layers", "split", "message"),
    [
        (3, {"stages": 4}, "parallel.pipeline_model_parallel_size=4: 4 stages for the 3 layers of a model"),
        (
            8,
            {"stages": 4, "first": 6},
            "first_stage_layers=6: leaves 2 of the 8 layers of a model for 3 other",
        ),
        (8, {"stages": 2, "first": 3, "last": 4}, "leaves 1 of the 8 layers of a model for 0 other stages, where none"),
        (
            8,
            {"stages": 2, "first": 5, "last": 4},
            "parallel.last_stage_layers=4: more than the 8 layers of a model",
        ),
        (
            8,
            {"stages": 2, "virtual": 2, "last": 1},
            "parallel.last_stage_layers=1: must be at least 2, a layer for",
        ),
        (8, {"stages": 2, "last": 8, "is_student": False}, "parallel.teacher_last_stage_layers=8: leaves 0"),
    ],
)
def test_what_leaves_a_stage_empty_is_refused(layers: int, split: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        spread(layers, **split)
    assert message in str(refused.value)


def test_the_teacher_has_chunks_of_its_own() -> None:
    settings = ParallelSettings(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        teacher_virtual_pipeline_model_parallel_size=4,
        first_stage_layers=5,
        teacher_last_stage_layers=6,
    )
    assert student_split(settings) == PipelineSplit(2, 2, 5, None)
    assert teacher_split(settings) == PipelineSplit(2, 4, None, 6, is_student=False)
    alike = settings.model_copy(update={"teacher_virtual_pipeline_model_parallel_size": None})
    assert teacher_split(alike).virtual == 2


@pytest.mark.parametrize("setting", ["first_stage_layers", "teacher_virtual_pipeline_model_parallel_size"])
def test_a_setting_of_stages_needs_a_pipeline(setting: str) -> None:
    with pytest.raises(ValidationError, match=f"parallel.{setting}=2: needs parallel.pipeline_model_parallel_size"):
        ParallelSettings(**{setting: 2})
