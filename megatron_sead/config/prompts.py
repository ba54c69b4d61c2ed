"""Where prompts come from, and how a row becomes tokens. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sead.config.settings import PathOrHubName, Settings


class PromptSettings(Settings):
    """Where prompts come from and how a row becomes tokens."""

    path: PathOrHubName = Field(
        description="JSONL, JSON or parquet file, a folder of such, or a hub name for datasets.load_dataset"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set, or of a folder that holds several")
    prompt_field: str = Field("prompt", min_length=1, description="field with the problem")
    answer_field: str = Field("answer", min_length=1, description="field with the right answer, or a list of them")
    id_field: str = Field("id", description="field with a unique id; rows without one are numbered")
    difficulty_field: str = Field("difficulty", description="1 - pass rate of the initial student, in [0, 1]")
    level_field: str = Field("level", description="group under which accuracy is reported")
    template: Literal["chat", "plain"] = Field(
        "chat", description="chat: apply the chat template; plain: text as it is"
    )
    instruction: str = Field("", description="text appended to every prompt, e.g. how to mark the answer")
    max_prompt_tokens: int | None = Field(None, gt=0, description="longer prompts are an error; default: the context")
