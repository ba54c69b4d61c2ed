"""How many of a model's layers each pipeline stage gets: by settings, or so that stages take equal time."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.errors import UserError
from megatron_sead.wording import counted

StageLayers = tuple[tuple[int, ...], ...]  # layers of each chunk of each stage: [stages][chunks]


@dataclass(frozen=True)
class PipelineSplit:
    """What the settings say of one of the two models, which share the pipeline's ranks."""

    stages: int = 1
    virtual: int | None = None  # chunks on each stage; None: stages are not interleaved
    first: int | None = None  # layers of the first stage, over all of its chunks; None: as time says
    last: int | None = None
    is_student: bool = True  # its last stage computes the loss, over the whole vocabulary

    @property
    def chunks(self) -> int:
        """Of each stage."""
        return self.virtual or 1

    def setting(self, name: str) -> str:
        """A setting's name as a user writes it."""
        return f"parallel.{'' if self.is_student else 'teacher_'}{name}"


def student_split(parallel: ParallelSettings) -> PipelineSplit:
    return PipelineSplit(
        stages=parallel.pipeline_model_parallel_size,
        virtual=parallel.virtual_pipeline_model_parallel_size,
        first=parallel.first_stage_layers,
        last=parallel.last_stage_layers,
    )


def teacher_split(parallel: ParallelSettings) -> PipelineSplit:
    own = parallel.teacher_virtual_pipeline_model_parallel_size
    return PipelineSplit(
        stages=parallel.pipeline_model_parallel_size,
        virtual=parallel.virtual_pipeline_model_parallel_size if own is None else own,
        first=parallel.teacher_first_stage_layers,
        last=parallel.teacher_last_stage_layers,
        is_student=False,
    )


def layers_by_stage(layers: int, split: PipelineSplit, source: str, head: float = 0.0) -> StageLayers:
    """The layers of each chunk of each stage; chunk c of stage s is passed before chunk c of stage s + 1.

    Stages are even where the layers divide. Else each stage gets what keeps the slowest one as fast as it can be; of
    stages that are alike the later ones get more, as the first hold the activations of the most micro-batches. What
    a stage has more than its chunks divide goes to the first chunks.

    Args:
        source: where the model is, for messages.
        head: what the last stage does beside its layers, as so many layers.

    Raises:
        UserError: fewer layers than chunks, or than the settings leave for the other stages.
    """
    stages, chunks = split.stages, split.chunks
    if layers < stages * chunks:
        raise UserError(f"{_told_stages(split)} for the {counted(layers, 'layer')} of {source}: each needs one or more")
    fixed = {0: split.first, stages - 1: split.last} if stages > 1 else {}
    given = {stage: count for stage, count in fixed.items() if count is not None}
    if not given and layers % (stages * chunks) == 0:
        return ((layers // (stages * chunks),) * chunks,) * stages
    _check_given(layers, split, source, given)
    counts = {stage: given.get(stage, chunks) for stage in range(stages)}
    open_stages = [stage for stage in range(stages - 1, -1, -1) if stage not in given]
    for _ in range(layers - sum(counts.values())):
        slowest = min(open_stages, key=lambda stage: counts[stage] + (head if stage == stages - 1 else 0.0))
        counts[slowest] += 1
    return tuple(
        tuple(counts[stage] // chunks + (chunk < counts[stage] % chunks) for chunk in range(chunks))
        for stage in range(stages)
    )


def _check_given(layers: int, split: PipelineSplit, source: str, given: dict[int, int]) -> None:
    told = [
        f"{split.setting(name)}={count}"
        for name, count in (("first_stage_layers", split.first), ("last_stage_layers", split.last))
        if count is not None
    ]
    for name, count in zip(told, given.values(), strict=True):
        if count < split.chunks:
            raise UserError(f"{name}: must be at least {split.chunks}, a layer for each virtual stage")
    left, others = layers - sum(given.values()), split.stages - len(given)
    if left < 0:
        raise UserError(f"{', '.join(told)}: more than the {layers} layers of {source}")
    least = others * split.chunks
    if left < least or (not others and left):
        wanted = f"{least} or more" if others else "none"
        raise UserError(
            f"{', '.join(told)}: leaves {left} of the {layers} layers of {source} for "
            f"{counted(others, 'other stage')}, where {wanted} must be left"
        )


def _told_stages(split: PipelineSplit) -> str:
    told = f"parallel.pipeline_model_parallel_size={split.stages}"
    if split.virtual is not None:
        told += f" x virtual_pipeline_model_parallel_size={split.virtual}"
    return f"{told}: {counted(split.stages * split.chunks, 'stage')}"
