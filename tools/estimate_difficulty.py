"""How hard each prompt is for a model: ``tools/estimate_difficulty.py --model DIR --prompts FILE --output FILE``.

Difficulty is 1 - pass rate of K rollouts of the initial student. The curriculum reads it; it is measured once. What it
depends on (K, seed, decoding, grader) stands beside the output in ``OUTPUT.provenance.json``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sead.cli import one_line_errors
from megatron_sead.config import GradingSettings, ModelSettings, PromptSettings, RolloutSettings, Settings
from megatron_sead.errors import UserError
from megatron_sead.grading import GRADER_VERSION, Grader
from megatron_sead.prompts import ModelTokenizer, Prompt, load_prompts, load_tokenizer
from megatron_sead.prompts.rows import read_rows
from megatron_sead.rollouts import GenerationRequest, RolloutEngine, Sampling, make_engine
from megatron_sead.settings_file import load_settings

DIFFICULTY_STEP = -2  # neither a training step (0 and up) nor an evaluation (-1): their draws are others


class EstimateSettings(Settings):
    """What difficulty is measured with. Groups mean what they mean in a training run's configuration."""

    model: ModelSettings
    prompts: PromptSettings
    rollouts: RolloutSettings = RolloutSettings()
    grading: GradingSettings = GradingSettings()
    samples: int = Field(8, ge=1, description="K: rollouts a prompt")
    seed: int = Field(0, ge=0)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"

    def problems(self) -> Iterator[str]:
        if self.rollouts.engine == "replay":
            yield "rollouts.engine='replay': must be an engine that generates; difficulty is measured on new rollouts"
        if self.rollouts.temperature == 0 and self.samples > 1:
            yield f"samples={self.samples}: must be 1 when rollouts.temperature is 0: greedy samples are all the same"


class Tally:
    """Passes per prompt in ``OUTPUT.partial``: appended as they come, so that nothing is lost when the command stops.

    Raises:
        UserError: the partial file was made with other settings.
    """

    def __init__(self, path: Path, measurement: dict[str, Any]) -> None:
        self.path = path
        self.passes: dict[str, int] = {}
        whole = self._read(measurement) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)  # a line cut short by a kill is measured again
        if not whole:
            self._append({"measurement": measurement})

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
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].decode().splitlines()
        if not lines:
            return 0
        try:
            header, *records = (json.loads(line) for line in lines)
            earlier = header["measurement"]
            self.passes = {record["id"]: record["passes"] for record in records}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: not a partial result of this command; delete it to start anew") from None
        for key in sorted(earlier.keys() | measurement.keys()):
            if earlier.get(key) != measurement.get(key):
                raise UserError(
                    f"{self.path}: was begun with {key}={earlier.get(key)!r}, now {measurement.get(key)!r}; "
                    "use the same settings to continue, or delete it to start anew"
                )
        return whole


def main(
    output: Annotated[Path, typer.Option(help="JSONL file to write: the prompts, each with its difficulty")],
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory of the initial student")] = None,
    prompts: Annotated[str | None, typer.Option(help="prompt file or hub data set")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with model, prompts, rollouts, samples, ...")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value ...", help="as samples=8 or rollouts.temperature=0.7")
    ] = None,
) -> None:
    """Write K rollouts a prompt, grade them, and store 1 - pass rate beside each prompt. Resumes where it stopped."""
    with one_line_errors():
        given = [f"model.path={model}"] if model is not None else []
        given += [f"prompts.path={prompts}"] if prompts is not None else []
        settings = load_settings(EstimateSettings, config, given + (overrides or []))
        if output.exists():
            raise UserError(f"--output={output}: exists already; choose another name, or delete it")
        try:
            estimate(settings, output)
        except KeyboardInterrupt:
            print(f"interrupted; the same command continues from {partial_path(output)}", file=sys.stderr)
            raise typer.Exit(130) from None


def estimate(settings: EstimateSettings, output: Path) -> None:
    """Measure what is not measured yet, then write output and provenance, and drop the partial file."""
    tokenizer = load_tokenizer(settings.model, "model")
    prompts = load_prompts(settings.prompts, tokenizer, max_new_tokens=settings.rollouts.max_new_tokens)
    measurement = describe(settings, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally(partial_path(output), measurement)
    try:
        left = [prompt for prompt in prompts if prompt.id not in tally.passes]
        if left:
            measure(settings, tokenizer, left, tally, done=len(prompts) - len(left))
    finally:
        tally.close()
    difficulties = [1 - tally.passes[prompt.id] / settings.samples for prompt in prompts]
    write_results(settings, output, difficulties, measurement)
    tally.path.unlink()
    unsolved = sum(difficulty == 1 for difficulty in difficulties)
    Console().print(
        f"{output}: {len(prompts)} prompts, mean difficulty {sum(difficulties) / len(prompts):.3f}, "
        f"{unsolved} never solved, {sum(d == 0 for d in difficulties)} always"
    )


def measure(
    settings: EstimateSettings, tokenizer: ModelTokenizer, prompts: list[Prompt], tally: Tally, done: int
) -> None:
    """Fill the tally, a batch of prompts at a time."""
    engine = make_engine(
        settings.rollouts,
        settings.model.path,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        seed=settings.seed,
        device=torch.device(settings.device),
        dtype=torch.float32 if settings.precision == "fp32" else torch.bfloat16,
    )
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


def describe(settings: EstimateSettings, tokenizer: ModelTokenizer) -> dict[str, Any]:
    """Everything that a difficulty depends on, and nothing that it does not (batch size, device)."""
    rollouts = settings.rollouts
    return {
        "model": str(settings.model.path),
        "prompts": settings.prompts.model_dump(mode="json"),
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


def write_results(
    settings: EstimateSettings, output: Path, difficulties: list[float], measurement: dict[str, Any]
) -> None:
    """The prompt file last: where it is, everything is."""
    provenance = {"difficulty": "1 - pass rate", **measurement, "prompt_count": len(difficulties)}
    _write_whole(output.with_name(output.name + ".provenance.json"), json.dumps(provenance, indent=2) + "\n")
    rows = zip(read_rows(settings.prompts), difficulties, strict=True)
    lines = [row.fields | {settings.prompts.difficulty_field: difficulty} for row, difficulty in rows]
    _write_whole(output, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
