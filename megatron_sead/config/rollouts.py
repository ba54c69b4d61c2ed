"""How the student writes: one group of settings an engine, and `engine` says which. No torch here.

A new engine adds its group here, and the group to `AnyRollouts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from megatron_sead.config.settings import LocalPath, Settings

ENGINE = Field(description="what writes the rollouts; the settings beside it are this engine's")


class EngineSettings(Settings):
    """What every engine is told."""

    # Settings of how it works, not of what it writes: a resumed run may change them
    MAY_CHANGE_ON_RESUME: ClassVar[tuple[str, ...]] = ("batch_size",)
    UNAVAILABLE: ClassVar[str | None] = None  # why no run can have it so far

    engine: Annotated[str, ENGINE]
    temperature: float = Field(0.7, ge=0, description="0: greedy. The loss is always at temperature 1")
    top_p: float = Field(1.0, gt=0, le=1, description="tokens are drawn from the fewest that have this probability")
    max_new_tokens: int = Field(16384, ge=1, description="length at which a response is cut")
    samples_per_prompt: int = Field(1, ge=1, description="rollouts of each prompt of a step")
    batch_size: int = Field(64, ge=1, description="rollouts written at once on one rank")

    @property
    def recorded(self) -> Path | None:
        """Where the rollouts of another run are read; None: the engine writes its own."""
        return None

    @property
    def writing(self) -> EngineSettings:
        """Settings of the engine that answers held-out prompts: these, unless their engine writes nothing."""
        return self

    def problems(self) -> Iterator[str]:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            yield (
                f"rollouts.samples_per_prompt={self.samples_per_prompt}: must be 1 when rollouts.temperature is 0: "
                "greedy samples of a prompt are all the same"
            )


class TransformersRollouts(EngineSettings):
    """A Hugging Face model on every rank."""

    engine: Annotated[Literal["transformers"], ENGINE] = "transformers"


class VllmRollouts(EngineSettings):
    """vLLM on the GPUs of the ranks."""

    UNAVAILABLE = "vllm is not supported by this version; use 'transformers' or 'replay'"

    engine: Annotated[Literal["vllm"], ENGINE] = "vllm"


class ReplayRollouts(EngineSettings):
    """Rollouts that another run recorded. Held-out prompts are answered by transformers, which has these settings."""

    engine: Annotated[Literal["replay"], ENGINE] = "replay"
    path: LocalPath = Field(description="run directory, or its rollouts folder, to read from")

    @property
    def recorded(self) -> Path | None:
        return self.path

    @property
    def writing(self) -> EngineSettings:
        return TransformersRollouts(**self.model_dump(exclude={"engine", "path"}))


AnyRollouts = TransformersRollouts | VllmRollouts | ReplayRollouts


def _of_one_engine(values: Any) -> Any:
    """With the default engine; without settings of other engines that are null, which say nothing."""
    if not isinstance(values, dict):
        return values
    values = {"engine": "transformers", **values}
    groups = {group.model_fields["engine"].default: set(group.model_fields) for group in get_args(AnyRollouts)}
    foreign = set().union(*groups.values()) - groups.get(str(values["engine"]), set()) - {"engine"}
    return {name: value for name, value in values.items() if value is not None or name not in foreign}


RolloutSettings = Annotated[AnyRollouts, Field(discriminator="engine"), BeforeValidator(_of_one_engine)]
