"""What a record must hold, so that a damaged file is told in one line. No torch here."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_sead.errors import UserError
from megatron_sead.scaling.study import parse_run

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Much = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    """More than what is needed may stand there."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Layout(_Part):
    tp: Positive
    pp: Positive
    cp: Positive
    dp: Positive
    vpp: Positive | None
    sp: bool


class _Plan(_Part):
    peak_bytes: Count


class _Student(_Part):
    vocabulary: Count
    layers: Count


class _Record(_Part):
    """Of any run, also of one that failed."""

    name: str
    text: str
    ranks: Positive
    layout: _Layout
    settings: dict[str, Any]
    date: str
    reason: str | None = None
    plan: _Plan | None = None
    student: _Student | None = None
    notes: list[str] = []

    @model_validator(mode="after")
    def _names_a_run(self) -> Self:
        try:
            parse_run(self.text)
        except UserError as error:
            raise ValueError(str(error)) from None
        batch = self.settings.get("training.global_batch_size", 0)
        if self.reason is None and not isinstance(batch, int):
            raise ValueError(f"settings: training.global_batch_size={batch!r}: must be a whole number")
        return self


class _Machine(_Part):
    cpu: str
    cores: Positive | None


class _Tried(_Record):
    kind: Literal["measured"]
    machine: _Machine
    versions: dict[str, str]
    code: str
    load: list[float] = []


class _Step(_Part):
    step: Count
    seconds: Amount
    response_tokens: Positive
    loss: float | None = None
    grad_norm: float | None = None
    rollout_seconds: Amount = 0.0
    score_seconds: Amount = 0.0
    train_seconds: Amount = 0.0
    sync_seconds: Amount = 0.0


class _Collective(_Part):
    group: str
    calls: Count
    bytes: Count


class _Process(_Part):
    micro_batches: list[Count]
    padded_tokens: list[Count]
    cpu_seconds: list[Amount]
    collectives: list[_Collective]
    tensors_peak: dict[str, Count]
    resident_peak: Count
    allocated_peak: Count | None = None
    gpu: str = ""


class _Recorded(_Part):
    all: Positive


class _Measured(_Tried):
    warm_up: Positive
    watched: Count
    steps: list[_Step]
    processes: list[_Process]
    recorded: list[_Recorded]

    @model_validator(mode="after")
    def _counts_go_together(self) -> Self:
        timed = len(self.steps) - self.watched
        if timed <= self.warm_up:
            raise ValueError(f"steps: {len(self.steps)}, of which none counts after warm_up={self.warm_up}")
        if [step.step for step in self.steps] != list(range(len(self.steps))):
            raise ValueError("steps: must be numbered from 0 on")
        if any(before.seconds >= after.seconds for before, after in pairwise(self.steps)):
            raise ValueError("steps: seconds must grow from step to step")
        if len(self.processes) != self.ranks:
            raise ValueError(f"processes: {len(self.processes)}, of {self.ranks} ranks")
        columns = [
            self.recorded,
            *(c for p in self.processes for c in (p.micro_batches, p.padded_tokens, p.cpu_seconds)),
        ]
        if any(len(column) < timed for column in columns):
            raise ValueError(f"processes, recorded: must hold a number for each of {timed} steps")
        if not sum(sum(process.padded_tokens[self.warm_up : timed]) for process in self.processes):
            raise ValueError("processes: padded_tokens: none in the steps that count")
        return self


class _Numbers(_Part):
    model_config = ConfigDict(extra="forbid")

    seconds: Much
    tokens: Much
    tokens_per_second: Much
    phases: dict[str, Amount]
    bubble: Amount
    micro_batches: Amount
    binds: str
    shares: dict[str, Amount]


class _Foreseen(_Record):
    kind: Literal["predicted"]
    source: str = ""


class _Predicted(_Foreseen):
    predicted: _Numbers


def require_record(record: object) -> None:
    """
    Raises:
        ValueError: something is missing or wrong; says what in one line.
    """
    given = record if isinstance(record, dict) else {}
    failed, predicted = given.get("reason") is not None, given.get("kind") == "predicted"
    schema = (_Foreseen if failed else _Predicted) if predicted else (_Tried if failed else _Measured)
    try:
        schema.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise ValueError(f"{place}{first['msg'].removeprefix('Value error, ')}") from None
