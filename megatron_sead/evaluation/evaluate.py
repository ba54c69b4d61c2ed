"""Models asked benchmarks: every answer kept with its grade, then one table of all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.rollouts import RolloutSettings, TransformersRollouts
from megatron_sead.config.run import GradingSettings, ModelSettings, load_config
from megatron_sead.config.settings import Settings
from megatron_sead.config.settings_file import dotted_keys, load_settings, read_yaml, settings_from
from megatron_sead.errors import UserError
from megatron_sead.evaluation.accuracy import EVALUATION_STEP
from megatron_sead.evaluation.asking import Questions, progress
from megatron_sead.evaluation.benchmarks import BOXED, Benchmark, read_benchmark
from megatron_sead.evaluation.difficulty import RUN_KEYS
from megatron_sead.evaluation.groups import Groups
from megatron_sead.evaluation.measuring import Measured, describe, examiner, opened_tally, sampling_of
from megatron_sead.evaluation.models import Model
from megatron_sead.evaluation.ranks import Ranks
from megatron_sead.evaluation.tally import Graded, Tally
from megatron_sead.prompts.dataset import tokenize
from megatron_sead.prompts.problems import Problem, repeats
from megatron_sead.rollouts.engine import Sampling


class AskingSettings(Settings):
    """How a benchmark's problem becomes a prompt."""

    template: Literal["chat", "plain"] = Field("chat", description="chat: the chat template; plain: text as it is")
    instruction: str = Field(BOXED, description="text behind every problem")


class EvaluateSettings(Settings):
    """What models are evaluated with. Groups mean what they mean in a training run's configuration."""

    model: ModelSettings  # how the models are spoken to; each has a path of its own
    prompts: AskingSettings = AskingSettings()
    rollouts: RolloutSettings = TransformersRollouts()
    grading: GradingSettings = GradingSettings()
    samples: int | None = Field(None, ge=1, description="answers a problem; 1: greedy; default: each benchmark's own")
    limit: int | None = Field(None, ge=1, description="the first so many problems of each benchmark")
    seed: int = Field(0, ge=0)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"

    def problems(self) -> Iterator[str]:
        if self.rollouts.recorded is not None:
            yield f"rollouts.engine={self.rollouts.engine!r}: must be an engine that generates"
        if self.rollouts.temperature == 0 and (self.samples or 1) > 1:
            yield f"samples={self.samples}: must be 1 when rollouts.temperature is 0: greedy samples are all the same"


def load_evaluate_settings(path: Path | None, overrides: list[str], model: Path) -> EvaluateSettings:
    """Settings from a file of their own, or from a training run's: its student's speech, its template, rollouts,
    grading, seed, device and precision.

    Args:
        overrides: ``key=value`` of `EvaluateSettings`; with a training run's file its keys as well.
        model: the first of those that are evaluated.

    Raises:
        UserError: as `load_settings`.
    """
    if any(text.partition("=")[0].strip() == "model.path" for text in overrides):
        raise UserError("model.path: is not set here; name the models as options, one or several")
    own = [f"model.path={model}", *overrides]
    if path is None or "student" not in read_yaml(path):
        return load_settings(EvaluateSettings, path, own)
    keys = dotted_keys(EvaluateSettings)
    of_run = [text for text in overrides if (key := text.partition("=")[0].strip()) not in keys and key in RUN_KEYS]
    run = load_config(path, of_run)
    values: dict[str, Any] = {"model": run.student, "rollouts": run.rollouts.writing, "grading": run.grading}
    settings: dict[str, Any] = {name: group.model_dump() for name, group in values.items()}
    settings |= {"seed": run.seed, "device": run.device, "precision": run.training.precision}
    settings["prompts"] = {"template": run.prompts.template}
    return settings_from(EvaluateSettings, settings, [text for text in own if text not in of_run])


@dataclass(frozen=True)
class Task:
    """A benchmark with its problems, and how they are asked."""

    name: str
    problems: list[Problem]
    groups: Groups
    prompts: PromptSettings  # by which they become prompts
    samples: int
    sampling: Sampling


@dataclass(frozen=True)
class Sitting:
    """A model before a task: its questions, and on the first rank the file of answers."""

    name: str  # the task's
    questions: Questions
    tally: Tally | None
    done: int  # answers that it holds

    @property
    def is_complete(self) -> bool:
        return self.done == len(self.questions.keys)

    def answers(self) -> list[list[Graded]]:
        """Of every prompt its samples, all of which are there."""
        assert self.tally is not None
        known, samples = self.tally.answers, range(self.questions.samples)
        return [[known[prompt.id, sample] for sample in samples] for prompt in self.questions.prompts]


Convert = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Outcome:
    """All answers; by model and benchmark, of each prompt its samples."""

    answers: dict[str, dict[str, list[list[Graded]]]]
    groups: dict[str, Groups]  # of each benchmark


def evaluate_models(
    settings: EvaluateSettings,
    models: Sequence[Model],
    benchmarks: Sequence[Benchmark],
    output: Path,
    ranks: Ranks,
    convert: Convert,
) -> Outcome:
    """Ask every model what it was not asked yet. Collective; the first rank writes, and it alone has the answers.

    Everything is looked at before anything is asked: a mistake in the last benchmark shows at once.

    Args:
        convert: is called on the first rank with a checkpoint that must become a Hugging Face directory, and its place.

    Raises:
        UserError: whatever must change first; nothing that stands there is overwritten.
    """
    tasks = [_task(settings, benchmark) for benchmark in benchmarks]
    for task in tasks if ranks.rank == 0 else ():
        for line in repeats(task.problems, task.name):
            print(f"note: {line}", file=sys.stderr)
    measured = [_measured(settings, model, output, ranks, convert) for model in models]
    questions = [[_questions(settings, model, task) for task in tasks] for model in measured]
    with ExitStack() as stack:
        sittings = [
            [
                stack.enter_context(_sitting(settings, whole, asked, output / model.label, task.name, ranks))
                for task, asked in zip(tasks, of_model, strict=True)
            ]
            for model, whole, of_model in zip(models, measured, questions, strict=True)
        ]
        for model, whole, of_model in zip(models, measured, sittings, strict=True):
            _complete(settings, model.label, whole, of_model, ranks)
        answers = {
            model.label: {sitting.name: sitting.answers() for sitting in of_model}
            for model, of_model in zip(models, sittings if ranks.rank == 0 else (), strict=ranks.rank == 0)
        }
        return Outcome(answers, {task.name: task.groups for task in tasks})


def _task(settings: EvaluateSettings, benchmark: Benchmark) -> Task:
    samples, rollouts = settings.samples or benchmark.samples, settings.rollouts
    if samples > 1 and rollouts.temperature == 0:
        raise UserError(
            f"rollouts.temperature=0: {benchmark.name} is the mean of {samples} samples, which greedily are all the "
            "same; set samples=1, or another temperature"
        )
    asking = settings.prompts
    prompts, problems, groups = read_benchmark(benchmark, asking.template, asking.instruction, settings.limit)
    sampling = sampling_of(rollouts) if samples > 1 else Sampling(0.0, 1.0, rollouts.max_new_tokens)
    return Task(benchmark.name, problems, groups, prompts, samples, sampling)


def _measured(settings: EvaluateSettings, model: Model, output: Path, ranks: Ranks, convert: Convert) -> Measured:
    directory = model.directory(output)
    checkpoint = model.checkpoint
    if checkpoint is not None:
        ranks.on_first(lambda: convert(checkpoint, directory))
    return Measured.read(settings.model.model_copy(update={"path": directory}), ranks)


def _questions(settings: EvaluateSettings, model: Measured, task: Task) -> Questions:
    room = settings.rollouts.max_new_tokens
    prompts = tokenize(task.problems, task.prompts, model.tokenizer, max_new_tokens=room)
    return Questions(prompts, task.samples, task.sampling, EVALUATION_STEP)


@contextmanager
def _sitting(
    settings: EvaluateSettings, model: Measured, questions: Questions, folder: Path, name: str, ranks: Ranks
) -> Iterator[Sitting]:
    measurement = describe(settings, model, questions, settings.prompts.template)
    with opened_tally(folder / f"{name}.jsonl", measurement, questions, ranks) as (tally, done):
        yield Sitting(name, questions, tally, done)


def _complete(
    settings: EvaluateSettings, label: str, model: Measured, sittings: Sequence[Sitting], ranks: Ranks
) -> None:
    """Load the model if an answer is missing, and ask."""
    if all(sitting.is_complete for sitting in sittings):
        return
    with examiner(settings, model, [sitting.questions for sitting in sittings], ranks) as asking:
        for sitting in sittings:
            total = len(sitting.questions.keys)
            with progress(f"{label}, {sitting.name}", total, sitting.done, shown=ranks.rank == 0) as advance:
                asking.ask_missing(sitting.questions, sitting.tally, advance)
