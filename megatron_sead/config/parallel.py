"""The layout: how ranks share the models. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from pydantic import Field

from megatron_sead.config.settings import Settings

OF_STAGES = tuple(  # settings of a pipeline, without a meaning where there is none
    f"{model}{setting}"
    for model in ("", "teacher_")
    for setting in ("virtual_pipeline_model_parallel_size", "first_stage_layers", "last_stage_layers")
)


class ParallelSettings(Settings):
    """Megatron-Core layout. Data-parallel size is what is left of the ranks."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="ranks that share every matrix of a layer")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="stages that share the layers")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="chunks of layers on each stage, interleaved; null: one"
    )
    first_stage_layers: int | None = Field(
        None, ge=1, description="the student's layers on the first stage; null: stages of like time"
    )
    last_stage_layers: int | None = Field(
        None, ge=1, description="the student's layers on the last stage, which has the head; null: stages of like time"
    )
    teacher_virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="the teacher's chunks of layers on each stage; null: as many as the student's"
    )
    teacher_first_stage_layers: int | None = Field(
        None, ge=1, description="the teacher's layers on the first stage; null: like stages"
    )
    teacher_last_stage_layers: int | None = Field(
        None, ge=1, description="the teacher's layers on the last stage; null: like stages"
    )
    context_parallel_size: int = Field(1, ge=1, description="ranks that share every sequence")
    sequence_parallel: bool = Field(
        False, description="split norms and residuals over the sequence on the tensor-parallel ranks"
    )
    timeout_minutes: float = Field(
        60.0,
        gt=0,
        le=100_000,
        description="longest wait of a rank for others, as for their rollouts; then the run ends",
    )

    @property
    def timeout(self) -> timedelta:
        """Of every process group."""
        return timedelta(minutes=self.timeout_minutes)

    def problems(self) -> Iterator[str]:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield (
                "parallel.sequence_parallel=true: needs parallel.tensor_model_parallel_size of at least 2, not 1: "
                "it splits the sequence over the tensor-parallel ranks"
            )
        for name in OF_STAGES if self.pipeline_model_parallel_size == 1 else ():
            if (value := getattr(self, name)) is not None:
                yield (
                    f"parallel.{name}={value}: needs parallel.pipeline_model_parallel_size of at least 2, not 1; or "
                    "set it to null"
                )
