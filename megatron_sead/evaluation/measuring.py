"""What difficulty and benchmarks share beside asking: the model that is measured, and what its answers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megatron_sead.checkpoints.weight_checksums import weight_checksums
from megatron_sead.config.rollouts import EngineSettings, RolloutSettings
from megatron_sead.config.run import GradingSettings, ModelSettings
from megatron_sead.evaluation.asking import Examiner, Questions
from megatron_sead.evaluation.ranks import Ranks
from megatron_sead.evaluation.tally import Tally
from megatron_sead.grading.grader import GRADER_VERSION, Grader
from megatron_sead.prompts.exact_json import dumps
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer
from megatron_sead.rollouts.engine import EngineContext, Sampling
from megatron_sead.rollouts.registry import make_engine


class MeasuringSettings(Protocol):
    """What both commands' settings have."""

    rollouts: RolloutSettings
    grading: GradingSettings
    seed: int
    precision: Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Measured:
    """A model that is asked, and how it speaks."""

    directory: Path
    tokenizer: ModelTokenizer
    weights: str  # a checksum: what tells whether they are still the same

    @classmethod
    def read(cls, settings: ModelSettings, ranks: Ranks) -> Measured:
        """Collective; the ranks share the reading of the weights.

        Raises:
            UserError: a directory that is no whole model, or a tokenizer that cannot be used.
        """
        tokenizer = load_tokenizer(settings, "model")
        sums = json.dumps(weight_checksums(settings.path, ranks.group))
        return cls(settings.path, tokenizer, hashlib.sha256(sums.encode()).hexdigest()[:16])


def sampling_of(rollouts: EngineSettings) -> Sampling:
    """As a run's settings say."""
    return Sampling(rollouts.temperature, rollouts.top_p, rollouts.max_new_tokens)


def describe(
    settings: MeasuringSettings, model: Measured, questions: Questions, template: Literal["chat", "plain"]
) -> dict[str, Any]:
    """Everything that answers and grades depend on, and nothing that they do not (batch size, ranks, device)."""
    tokenizer, prompts = model.tokenizer, questions.prompts
    asked = dumps([[prompt.id, prompt.student_token_ids, prompt.answers] for prompt in prompts])
    return {
        "weights": model.weights,
        "prompts_content": f"{len(prompts)} prompts, sha256 {hashlib.sha256(asked.encode()).hexdigest()[:16]}",
        "samples": questions.samples,
        "seed": settings.seed,
        "engine": settings.rollouts.engine,
        "sampling": asdict(questions.sampling),
        "stop_token_ids": list(tokenizer.stop_token_ids),
        "chat_template": tokenizer.chat_template if template == "chat" else None,
        "system_prompt": tokenizer.system_prompt,
        "precision": settings.precision,
        "grader_version": GRADER_VERSION,
        "grading_timeout_seconds": settings.grading.timeout_seconds,
    }


@contextmanager
def opened_tally(
    path: Path, measurement: dict[str, Any], questions: Questions, ranks: Ranks
) -> Iterator[tuple[Tally | None, int]]:
    """The file of answers on the first rank, which alone writes (None on the others), and how many it holds.

    Raises:
        UserError: on every rank: as `Tally`.
    """
    opened: list[Tally] = []

    def open_it() -> int:
        opened.append(Tally(path, measurement, questions.keys))
        return len(opened[0].answers)

    done = ranks.on_first(open_it)
    try:
        yield (opened[0] if opened else None), done
    finally:
        for tally in opened:
            tally.close()


@contextmanager
def examiner(
    settings: MeasuringSettings, model: Measured, questions: Sequence[Questions], ranks: Ranks
) -> Iterator[Examiner]:
    """The engine that the settings name, with this model, and a grader. Collective.

    Args:
        questions: all that will be asked, by which an engine knows how much it must hold.

    Raises:
        UserError: an engine that is not available, or a directory that it cannot load.
    """
    longest = max(len(prompt.student_token_ids) for asked in questions for prompt in asked.prompts)
    context = EngineContext(
        model.directory,
        stop_token_ids=model.tokenizer.stop_token_ids,
        pad_token_id=model.tokenizer.pad_token_id,
        seed=settings.seed,
        device=ranks.device,
        dtype=torch.float32 if settings.precision == "fp32" else torch.bfloat16,
        group=ranks.group,
        max_length=longest + settings.rollouts.max_new_tokens,
    )
    engine = make_engine(settings.rollouts, context)
    at_once = settings.rollouts.asked_at_once * ranks.size
    try:
        with Grader(settings.grading.timeout_seconds) as grader:
            yield Examiner(engine, model.tokenizer, grader, at_once, ranks.group)
    finally:
        engine.close()
