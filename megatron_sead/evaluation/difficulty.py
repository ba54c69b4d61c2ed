"""How hard each prompt is for a model: 1 - pass rate of K rollouts of the initial student.

The curriculum reads it; it is measured once. What it depends on (K, seed, decoding, grader) stands beside the output in
``OUTPUT.provenance.json``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sead.config.rollouts import RolloutSettings, TransformersRollouts
from megatron_sead.config.run import GradingSettings, ModelSettings, PromptSettings, RunConfig, load_config
from megatron_sead.config.settings import Settings
from megatron_sead.config.settings_file import dotted_keys, load_settings, read_yaml, settings_from
from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text
from megatron_sead.files.outputs import require_free
from megatron_sead.grading.grader import GRADER_VERSION, Grader
from megatron_sead.prompts.dataset import Prompt, tokenize
from megatron_sead.prompts.exact_json import dumps, holds_no_number
from megatron_sead.prompts.problems import check_rows, repeats
from megatron_sead.prompts.row_mistakes import RowMistakes
from megatron_sead.prompts.rows import Row, read_rows
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer
from megatron_sead.rollouts.engine import EngineContext, GenerationRequest, RolloutEngine, Sampling
from megatron_sead.rollouts.registry import make_engine
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


class Tally:
    """Passes per prompt in ``OUTPUT.partial``: appended as they come, so that nothing is lost when the command stops.

    Raises:
        UserError: the file is not this command's, damaged, or made with other settings or prompts.
    """

    def __init__(self, path: Path, measurement: dict[str, Any]) -> None:
        self.path = path
        self.passes: dict[str, int] = {}
        self._file = path.open("a+b")
        try:
            whole = self._read(measurement)
            self._file.truncate(whole)  # a line cut short by a kill is measured again
            if not whole:
                self._append({"measurement": measurement})
        except BaseException:
            self._file.close()
            raise

    def add(self, prompt_id: str, passes: int) -> None:
        self.passes[prompt_id] = passes
        self._append({"id": prompt_id, "passes": passes})

    def close(self) -> None:
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()

    def _read(self, measurement: dict[str, Any]) -> int:
        """Bytes that hold whole lines."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if not whole and b'{"measurement": '.startswith(content[:16]):
            return 0  # nothing, or a first line cut short
        try:
            header, *records = (json.loads(line) for line in content[:whole].decode().split("\n")[:-1])
            earlier = dict(header["measurement"])
            self.passes = {record["id"]: record["passes"] for record in records}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{self.path}: not a partial result of this command, or damaged; move it away to start anew"
            ) from None
        self._require_same(earlier, measurement)
        return whole

    def _require_same(self, earlier: dict[str, Any], measurement: dict[str, Any]) -> None:
        for key in sorted(earlier.keys() | measurement.keys()):
            if earlier.get(key) != measurement.get(key):
                before, now = (textwrap.shorten(repr(values.get(key)), 100) for values in (earlier, measurement))
                raise UserError(
                    f"{self.path}: was begun with {key}={before}, now {now}; "
                    "use the same to continue, or move it away to start anew"
                )
        most = measurement["samples"]
        for prompt_id, count in self.passes.items():
            if type(count) is not int or not 0 <= count <= most:
                raise UserError(
                    f"{self.path}: damaged: says that prompt {prompt_id!r} passed {count!r} of {most} times"
                )


def estimate(settings: EstimateSettings, output: Path) -> None:
    """Measure what is not measured yet, then write output and provenance, and drop the partial file."""
    mistakes = RowMistakes()
    rows = read_rows(settings.prompts, mistakes=mistakes)
    problems = check_rows(rows, settings.prompts, mistakes=mistakes)
    field = settings.prompts.difficulty_field
    for line in [*repeats(problems, f"prompts.path={settings.prompts.path}"), *notes_on_writing(rows, field)]:
        print(f"note: {line}", file=sys.stderr)
    tokenizer = load_tokenizer(settings.model, "model")
    prompts = tokenize(problems, settings.prompts, tokenizer, max_new_tokens=settings.rollouts.max_new_tokens)
    measurement = describe(settings, tokenizer, prompts)
    provenance = json.dumps({"difficulty": "1 - pass rate", **measurement, "prompt_count": len(prompts)}, indent=2)
    require_free(provenance_path(output), provenance + "\n")
    tally = Tally(partial_path(output), measurement)
    try:
        left = [prompt for prompt in prompts if prompt.id not in tally.passes]
        if left:
            engine = start_engine(settings, tokenizer)
            measure(engine, settings, tokenizer, left, tally, done=len(prompts) - len(left))
            engine.close()
        difficulties = [1 - tally.passes[prompt.id] / settings.samples for prompt in prompts]
        lines = [dumps(row.fields | {field: value}) for row, value in zip(rows, difficulties, strict=True)]
        _write_whole(provenance_path(output), provenance + "\n")
        _write_whole(output, "\n".join(lines) + "\n")  # the prompt file last: where it is, everything is
        tally.path.unlink()
    finally:
        tally.close()
    unsolved = sum(difficulty == 1 for difficulty in difficulties)
    Console().print(
        f"{output}: {counted(len(prompts), 'prompt')}, mean difficulty {sum(difficulties) / len(prompts):.3f}, "
        f"{unsolved} never solved, {sum(d == 0 for d in difficulties)} always"
    )


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


def start_engine(settings: EstimateSettings, tokenizer: ModelTokenizer) -> RolloutEngine:
    """The engine that the settings name, with the model that is measured."""
    context = EngineContext(
        settings.model.path,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        seed=settings.seed,
        device=torch.device(settings.device),
        dtype=torch.float32 if settings.precision == "fp32" else torch.bfloat16,
    )
    return make_engine(settings.rollouts, context)


def measure(
    engine: RolloutEngine,
    settings: EstimateSettings,
    tokenizer: ModelTokenizer,
    prompts: list[Prompt],
    tally: Tally,
    done: int,
) -> None:
    """Fill the tally, a batch of prompts at a time."""
    rollouts = settings.rollouts
    sampling = Sampling(rollouts.temperature, rollouts.top_p, rollouts.max_new_tokens)
    at_once = max(1, rollouts.batch_size // settings.samples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Grader(settings.grading.timeout_seconds) as grader, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=done + len(prompts), completed=done)
        for start in range(0, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            passes = count_passes(engine, tokenizer, grader, batch, settings.samples, sampling)
            for prompt, count in zip(batch, passes, strict=True):
                tally.add(prompt.id, count)
            bar.advance(task, len(batch))


def count_passes(
    engine: RolloutEngine,
    tokenizer: ModelTokenizer,
    grader: Grader,
    prompts: list[Prompt],
    samples: int,
    sampling: Sampling,
) -> list[int]:
    """How many of each prompt's samples are right."""
    asked = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    requests = [GenerationRequest(prompt.id, sample, prompt.student_token_ids) for prompt, sample in asked]
    rollouts = engine.generate(requests, DIFFICULTY_STEP, sampling)
    responses = [tokenizer.decode(rollout.response_token_ids) for rollout in rollouts]
    correct = grader.grade_all(responses, [prompt.answers for prompt, _ in asked])
    return [sum(correct[start : start + samples]) for start in range(0, len(correct), samples)]


def describe(settings: EstimateSettings, tokenizer: ModelTokenizer, prompts: list[Prompt]) -> dict[str, Any]:
    """Everything that a difficulty depends on, and nothing that it does not (batch size, device)."""
    rollouts = settings.rollouts
    asked = dumps([[prompt.id, prompt.student_token_ids, prompt.answers] for prompt in prompts])
    return {
        "model": str(settings.model.path),
        "prompts": settings.prompts.model_dump(mode="json"),
        "prompts_content": f"{len(prompts)} prompts, sha256 {hashlib.sha256(asked.encode()).hexdigest()[:16]}",
        "samples": settings.samples,
        "seed": settings.seed,
        "sampling": asdict(Sampling(rollouts.temperature, rollouts.top_p, rollouts.max_new_tokens)),
        "stop_token_ids": list(tokenizer.stop_token_ids),
        "chat_template": tokenizer.chat_template if settings.prompts.template == "chat" else None,
        "system_prompt": tokenizer.system_prompt,
        "precision": settings.precision,
        "grader_version": GRADER_VERSION,
        "grading_timeout_seconds": settings.grading.timeout_seconds,
    }


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def provenance_path(output: Path) -> Path:
    return output.with_name(output.name + ".provenance.json")


def _write_whole(path: Path, text: str) -> None:
    require_free(path, text)
    replace_text(path, text)
