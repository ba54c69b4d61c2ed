"""Settings of a preparation. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.config.settings import Settings
from megatron_sead.config.settings_file import dotted_keys, load_settings

OF_PROMPTS = set(PromptSettings.model_fields)


class PrepareSettings(Settings):
    """How a released set is read, and what is left out of it."""

    prompts: PromptSettings
    model: ModelSettings | None = Field(None, description="whose tokens prompts.max_prompt_tokens counts")
    drop_instruction: bool = Field(False, description="leave out the lines that every prompt begins and ends with")
    benchmark_field: str | None = Field(
        None, description="field with a benchmark's problem; default: the first there is of problem, question, prompt"
    )
    overlap_ngram: int = Field(8, ge=2, description="words in a row that count as the same place of two problems")
    overlap_share: float = Field(
        0.5, gt=0, le=1, description="share of a benchmark problem's n-grams from which a prompt is a near-duplicate"
    )

    def problems(self) -> Iterator[str]:
        if self.prompts.max_prompt_tokens is not None and self.model is None:
            yield (
                f"prompts.max_prompt_tokens={self.prompts.max_prompt_tokens}: tokens are those of a model; "
                "name its directory with model.path"
            )


def load_prepare_settings(source: str, model: str | None, overrides: list[str]) -> PrepareSettings:
    """Settings from ``key=value``; those of the prompts group may be written without its name.

    Args:
        source: file or hub name, as prompts.path.
        model: directory, as model.path.

    Raises:
        UserError: as `load_settings`.
    """
    own = dotted_keys(PrepareSettings)
    given = [f"prompts.path={source}"] + ([f"model.path={model}"] if model is not None else [])
    for text in overrides:
        key = text.partition("=")[0].strip()
        given.append(f"prompts.{text.strip()}" if key in OF_PROMPTS and key not in own else text)
    return load_settings(PrepareSettings, None, given)
