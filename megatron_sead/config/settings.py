"""What every group of settings is made of. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from megatron_sead.config.environment import expand_path

LocalPath = Annotated[Path, BeforeValidator(expand_path)]
PathOrHubName = Annotated[str, BeforeValidator(expand_path)]


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors, values are checked when assigned.

    A group's ``problems`` are mistakes that no single value shows, one line each, naming the keys.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False)

    def problems(self) -> Iterator[str]:
        yield from ()

    @model_validator(mode="after")
    def _refuse_problems(self) -> Self:
        found = list(self.problems())
        if found:
            raise ValueError("\n".join(found))
        return self
