"""How hard each prompt is for a model: 1 - pass rate of K rollouts of the initial student.

The curriculum reads it; it is measured once. What it depends on (weights, K, seed, decoding, grader) stands beside the
output in ``OUTPUT.provenance.json``, and every answer with its grade in ``OUTPUT.answers.jsonl``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.rollouts import RolloutSettings, TransformersRollouts
from megatron_sead.config.run import GradingSettings, ModelSettings, RunConfig, load_config
from megatron_sead.config.settings import Settings
from megatron_sead.config.settings_file import dotted_keys, load_settings, read_yaml, settings_from
from megatron_sead.errors import UserError
from megatron_sead.evaluation.asking import Questions, progress
from megatron_sead.evaluation.difficulty_tables import print_tables
from megatron_sead.evaluation.measuring import Measured, describe, examiner, opened_tally, sampling_of
from megatron_sead.evaluation.ranks import Ranks
from megatron_sead.files.durable import replace_text
from megatron_sead.files.outputs import require_free
from megatron_sead.prompts.dataset import tokenize
from megatron_sead.prompts.exact_json import dumps, holds_no_number
from megatron_sead.prompts.folders import require_outside
from megatron_sead.prompts.problems import check_rows, repeats
from megatron_sead.prompts.row_mistakes import RowMistakes
from megatron_sead.prompts.rows import Row, read_rows
from megatron_sead.wording import counted

RUN_KEYS = dotted_keys(RunConfig)
DIFFICULTY_STEP = -2  # neither a training step (0 and up) nor an evaluation (-1): their draws are others


class EstimateSettings(Settings):
    """What difficulty is measured with. Groups mean what they mean in a training run's configuration."""

    model: ModelSettings
    prompts: PromptSettings
    rollouts: RolloutSettings = TransformersRollouts()
    grading: GradingSettings = GradingSettings()
    samples: int = Field(8, ge=1, description="K: rollouts a prompt")
    seed: int = Field(0, ge=0)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"

    def problems(self) -> Iterator[str]:
        if self.rollouts.recorded is not None:
            engine = f"rollouts.engine={self.rollouts.engine!r}"
            yield f"{engine}: must be an engine that generates; difficulty is measured on new rollouts"
        if self.rollouts.temperature == 0 and self.samples > 1:
            yield f"samples={self.samples}: must be 1 when rollouts.temperature is 0: greedy samples are all the same"
        prompts = self.prompts
        if prompts.difficulty_field in (prompts.prompt_field, prompts.answer_field, prompts.id_field):
            yield (
                f"prompts.difficulty_field={prompts.difficulty_field}: must not be the field of prompts, answers or "
                "ids, which the difficulty would replace"
            )


def load_estimate_settings(path: Path | None, overrides: list[str]) -> EstimateSettings:
    """Settings of an estimate, from a file of their own or from a training run's.

    Of a training run's file student, prompts, rollouts, grading, seed, device and precision are taken, so that
    difficulty is measured with what the run trains with.

    Args:
        overrides: ``key=value`` of `EstimateSettings`; with a training run's file its keys as well.

    Raises:
        UserError: as `load_settings`.
    """
    if path is None or "student" not in read_yaml(path):
        return load_settings(EstimateSettings, path, overrides)
    own = dotted_keys(EstimateSettings)
    of_run = [text for text in overrides if (key := text.partition("=")[0].strip()) not in own and key in RUN_KEYS]
    run = load_config(path, of_run)
    values = {"model": run.student, "prompts": run.prompts, "rollouts": run.rollouts, "grading": run.grading}
    settings: dict[str, Any] = {name: group.model_dump() for name, group in values.items()}
    settings |= {"seed": run.seed, "device": run.device, "precision": run.training.precision}
    return settings_from(EstimateSettings, settings, [text for text in overrides if text not in of_run])


def estimate(settings: EstimateSettings, output: Path, ranks: Ranks) -> None:
    """Measure what is not measured yet, then write output and provenance. Collective; the first rank writes.

    Raises:
        UserError: whatever must change first; nothing that stands there is overwritten.
    """
    require_outside(output, settings.prompts.path, "prompts.path")
    mistakes = RowMistakes()
    rows = read_rows(settings.prompts, mistakes=mistakes)
    problems = check_rows(rows, settings.prompts, mistakes=mistakes)
    field = settings.prompts.difficulty_field
    notes = [*repeats(problems, f"prompts.path={settings.prompts.path}"), *notes_on_writing(rows, field)]
    for line in notes if ranks.rank == 0 else ():
        print(f"note: {line}", file=sys.stderr)
    model = Measured.read(settings.model, ranks)
    prompts = tokenize(problems, settings.prompts, model.tokenizer, max_new_tokens=settings.rollouts.max_new_tokens)
    questions = Questions(prompts, settings.samples, sampling_of(settings.rollouts), DIFFICULTY_STEP)
    measurement = describe(settings, model, questions, settings.prompts.template)
    told = {"difficulty": "1 - pass rate", "model": str(settings.model.path), **measurement}
    told |= {"prompts": settings.prompts.model_dump(mode="json"), "prompt_count": len(prompts)}
    provenance = json.dumps(told, indent=2) + "\n"
    ranks.on_first(lambda: require_free(provenance_path(output), provenance))
    with opened_tally(answers_path(output), measurement, questions, ranks) as (tally, done):
        total = len(questions.keys)
        if done < total:
            with (
                examiner(settings, model, [questions], ranks) as asking,
                progress("rollouts", total, done, shown=ranks.rank == 0) as advance,
            ):
                asking.ask_missing(questions, tally, advance)
        if tally is not None:
            answers = [[tally.answers[prompt.id, i] for i in range(settings.samples)] for prompt in prompts]
            difficulties = [1 - sum(answer.correct for answer in of_prompt) / len(of_prompt) for of_prompt in answers]
            lines = [dumps(row.fields | {field: value}) for row, value in zip(rows, difficulties, strict=True)]
            write_new(provenance_path(output), provenance)
            write_new(output, "\n".join(lines) + "\n")  # the prompt file last: where it is, everything is
            print_tables(output, rows, settings.prompts.level_field, answers)
    ranks.on_first(lambda: None)  # the others leave when all is written


def notes_on_writing(rows: list[Row], difficulty_field: str) -> list[str]:
    """What the output will hold differently from the input.

    Raises:
        UserError: rows hold what no JSONL file can.
    """
    mistakes = RowMistakes()
    for row in rows:
        with mistakes.kept(row.place):
            _require_json(row)
    mistakes.refuse()
    replaced = sum(difficulty_field in row.fields for row in rows)
    emptied = [row.place for row in rows if holds_no_number(row.fields)]
    notes = []
    if replaced:
        has = "has" if replaced == 1 else "have"
        notes.append(f"{counted(replaced, 'row')} {has} a {difficulty_field!r} already; the output has the new one")
    if emptied:
        where = counted(len(emptied), "row")
        notes.append(f"NaN or infinity, which JSON has not, will be null in {where}, first {emptied[0]}")
    return notes


def _require_json(row: Row) -> None:
    for name, value in row.fields.items():
        try:
            dumps(value)
        except TypeError as error:
            raise UserError(
                f"{row.place}: {name!r} holds {error}, which a JSONL file cannot hold; drop this field first"
            ) from None


def answers_path(output: Path) -> Path:
    return output.with_name(output.name + ".answers.jsonl")


def provenance_path(output: Path) -> Path:
    return output.with_name(output.name + ".provenance.json")


def write_new(path: Path, text: str) -> None:
    """A file whole or not at all, where none is.

    Raises:
        UserError: something else stands there.
    """
    require_free(path, text)
    replace_text(path, text)
