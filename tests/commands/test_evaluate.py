"""The command as users run it: known answers give known tables, kills change nothing, mistakes are one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.commands.evaluate import main
from megatron_sead.config.run import ModelSettings
from megatron_sead.evaluation import measuring
from megatron_sead.evaluation.models import choose_models
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer
from megatron_sead.rollouts.engine import EngineContext, GenerationRequest, Rollout, Sampling
from tests.conftest import make_olmo3

PROBLEMS = 25


class KnownEngine:
    """Answers 1 to the first half of the problems; what it samples is right every other time. Slow on demand."""

    seconds = 0.0
    log: Path | None = None

    def __init__(self, tokenizer: ModelTokenizer, share: float) -> None:
        self.tokenizer, self.share = tokenizer, share

    def generate(self, requests: list[GenerationRequest], step: int, sampling: Sampling | None = None) -> list[Rollout]:
        assert sampling is not None
        time.sleep(self.seconds)
        if self.log is not None:
            with self.log.open("a") as file:
                file.writelines(f"{request.prompt_id} {request.sample}\n" for request in requests)
        return [self._answer(request, sampling) for request in requests]

    def _answer(self, request: GenerationRequest, sampling: Sampling) -> Rollout:
        right = int(request.prompt_id) < self.share * PROBLEMS and (
            sampling.temperature == 0 or request.sample % 2 == 0
        )
        finished = int(request.prompt_id) % 5 > 0
        tokens = self.tokenizer.encode("1" if right else "0") + ((1,) if finished else ())
        return Rollout(request.prompt_id, request.sample, request.prompt_token_ids, tokens, finished, None)

    def close(self) -> None: ...


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[KnownEngine]]:
    """The engine of every model: one whose directory is called half is right on half of the problems, others on all."""

    def make_engine(_: object, context: EngineContext) -> KnownEngine:
        assert context.max_length == len("24+1=") + 2  # the longest prompt, a character a token, and its answer
        tokenizer = load_tokenizer(ModelSettings(path=context.directory), "model")
        return KnownEngine(tokenizer, 0.5 if context.directory.name == "half" else 1.0)

    monkeypatch.setattr(measuring, "make_engine", make_engine)
    yield KnownEngine
    KnownEngine.seconds, KnownEngine.log = 0.0, None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(make_olmo3(folder / name, seed=seed)) for seed, name in enumerate(("half", "all"))]


@pytest.fixture
def benchmarks(tmp_path: Path) -> list[str]:
    """One greedy, with levels; one sampled."""
    for name, levels in (("gsm8k", {True: 10, False: 2}), ("aime24", {})):
        rows = [
            {"id": i, "problem": f"{i}+1=", "answer": "1", "level": levels.get(i % 2 == 0), "source": f"p. {i}"}
            for i in range(PROBLEMS)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{name}={tmp_path / name}.jsonl" for name in ("gsm8k", "aime24")]


SETTINGS = ["device=cpu", "prompts.template=plain", "prompts.instruction=", "rollouts.max_new_tokens=2"]
SETTINGS += ["rollouts.batch_size=16"]


def evaluate(models: list[str], benchmarks: list[str], output: Path, *overrides: str) -> int:
    """In this process; the exit code."""
    try:
        main(models, output, benchmarks, None, None, [*SETTINGS, *overrides])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_known_answers_give_known_numbers(
    known: object, models: list[str], benchmarks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate(models, benchmarks, output) == 0
    told = capsys.readouterr()
    found = results(output)["results"]
    greedy, sampled = found["half"]["gsm8k"], found["half"]["aime24"]
    assert (greedy["prompts"], greedy["samples"], greedy["accuracy"], greedy["truncated"]) == (25, 1, 0.52, 0.2)
    assert greedy["standard_error"] == pytest.approx((0.52 * 0.48 / 24) ** 0.5)
    assert greedy["accuracy_if_finished"] == pytest.approx(10 / 20)
    assert greedy["mean_tokens"] == pytest.approx(1.8)
    assert (sampled["samples"], sampled["accuracy"]) == (32, pytest.approx(0.26))
    assert sampled["standard_error"] == pytest.approx((0.25 * 0.52 * 0.48 / 24) ** 0.5)  # 32 answers are one unit
    assert (found["all"]["gsm8k"]["accuracy"], found["all"]["aime24"]["accuracy"]) == (1, 0.5)
    difference = results(output)["differences"]["all"]["gsm8k"]
    assert (difference["mean"], difference["against"]) == (pytest.approx(0.48), "half")
    assert 0.25 < difference["low"] < 0.35 < 0.6 < difference["high"] < 0.7
    assert results(output)["average"]["half"]["accuracy"] == pytest.approx(0.39)
    for text in (told.out, (output / "results.md").read_text()):
        assert "GSM8K" in text and "52.0% ± 10.2" in text and "all against half" in text and "+48.0" in text
    groups = results(output)["groups"]
    assert groups.keys() == {"gsm8k"} and groups["gsm8k"].keys() == {"level"}  # each row has a source of its own
    levels = groups["gsm8k"]["level"]
    assert [(name, level["half"]["prompts"], level["all"]["accuracy"]) for name, level in levels.items()] == [
        ("2", 12, 1),
        ("10", 13, 1),
    ]
    assert levels["2"]["half"]["accuracy"] == pytest.approx(6 / 12)  # of the odd ones 1, 3, ... 11
    assert levels["10"]["half"]["accuracy"] == pytest.approx(7 / 13)
    lines = (output / "results.md").read_text().splitlines()
    table = lines[lines.index("## GSM8K by level") :][2:6]
    assert table[0] == "| level | problems | half | all |"
    assert table[2:] == [
        "| 2 | 12 | 50.0% ± 15.1 | 100.0% ± 0.0 |",
        "| 10 | 13 | 53.8% ± 14.4 | 100.0% ± 0.0 |",
    ]
    assert "GSM8K by level" in told.out
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    header, *answers = (output / "half" / "aime24.jsonl").read_text().splitlines()
    assert len(answers) == 25 * 32
    line = {"prompt_id": "3", "sample": 1, "response": "0", "tokens": 2, "finished": True, "correct": False}
    assert json.loads(answers[3 * 32 + 1]) == line
    assert json.loads(header)["measurement"]["sampling"] == {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 2}


def test_a_model_more_asks_that_model_alone(
    known: type[KnownEngine], models: list[str], benchmarks: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert evaluate(models[:1], benchmarks, output) == 0
    known.log = tmp_path / "log"
    assert evaluate(models, benchmarks, output) == 0
    assert len(known.log.read_text().splitlines()) == PROBLEMS * 33
    assert list(results(output)["results"]) == ["half", "all"]
    (output / "results.md").write_text("my notes")
    assert evaluate(models, benchmarks, output) == 2
    assert (output / "results.md").read_text() == "my notes"


def test_killed_again_and_again_it_comes_to_the_same_table(
    known: type[KnownEngine], models: list[str], benchmarks: list[str], tmp_path: Path
) -> None:
    """Ten kills at random moments: nothing that was kept is asked again, and the table is the same."""
    whole, output = tmp_path / "whole", tmp_path / "killed"
    assert evaluate(models, benchmarks, whole) == 0
    known.seconds, known.log = 0.02, tmp_path / "log"
    draws, kills, code = random.Random(0), 0, None
    while code != 0:
        process = os.fork()
        if process == 0:
            os._exit(evaluate(models, benchmarks, output))
        if kills < 10:
            time.sleep(draws.uniform(0.1, 0.7))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        kills += os.WIFSIGNALED(status)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL)
    assert kills > 3
    answers = [f"{model}/{name}.jsonl" for model in ("half", "all") for name in ("gsm8k", "aime24")]
    for name in ("results.json", "results.md", *answers):
        assert (output / name).read_text() == (whole / name).read_text()
    asked = len(known.log.read_text().splitlines())
    assert PROBLEMS * 33 * 2 <= asked <= PROBLEMS * 33 * 2 + 16 * kills  # what was in one call each time


def test_mistakes_are_one_line(
    known: object, models: list[str], benchmarks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.md").touch()
    (tmp_path / "begun" / "half").mkdir(parents=True)
    (tmp_path / "begun" / "half" / "gsm8k.jsonl").write_text("{}\n")
    [half, _] = models
    cases: list[tuple[list[str], list[str], Path, list[str], str]] = [
        ([str(tmp_path / "no")], benchmarks, output, [], "no such directory; must be a Hugging Face directory"),
        ([half, half], benchmarks, output, [], "is called half, too; name them LABEL=PLACE"),
        ([f"{half}@3"], benchmarks, output, [], "holds no checkpoint"),
        ([half], benchmarks, output, ["rollouts.temperature=0"], "aime24 is the mean of 32 samples"),
        ([half], benchmarks, output, ["model.path=x"], "model.path: is not set here"),
        ([half], benchmarks, output, ["temperature=1"], "did you mean rollouts.temperature"),
        ([half], benchmarks, output, ["rollouts.engine=replay", "rollouts.path=x"], "must be an engine that generates"),
        ([half], benchmarks, output, ["rollouts.max_new_tokens=999"], "leaves no room for 999 new ones"),
        ([half], [f"own={tmp_path}/no.jsonl"], output, [], "own=" + str(tmp_path / "no.jsonl: no such file")),
        ([half], benchmarks, tmp_path / "foreign", [], "results.md: was not written by this command"),
        ([half], benchmarks, tmp_path / "begun", [], "half/gsm8k.jsonl, line 1: not written by this command"),
        ([half], benchmarks, Path(half), [], "overlaps"),
    ]
    for places, tasks, written, overrides, message in cases:
        assert evaluate(places, tasks, written, *overrides) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert message in errors[0], errors
        assert all(line.startswith("error: ") for line in errors)  # of several mistakes each is a line
    assert not output.exists()


def test_a_run_is_its_student_or_a_step(models: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 3):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "metadata.json").touch()
    [step] = choose_models([f"{run}/checkpoints/step-00000003"], tmp_path / "out")
    assert step.label == "step-00000003"
    assert str(step.directory(tmp_path)).startswith(f"{tmp_path}/step-00000003/hf-step-00000003-")
    shutil.copytree(models[0], run / "student-hf")
    [finished] = choose_models([str(run)], tmp_path / "out")
    assert (finished.label, finished.directory(tmp_path)) == ("run", run / "student-hf")
    [named] = choose_models([f"before={run}"], tmp_path / "out")
    assert named.label == "before"


def test_a_checkpoint_is_converted_once(
    known: type[KnownEngine], models: list[str], benchmarks: list[str], tmp_path: Path
) -> None:
    checkpoint, output = tmp_path / "all", tmp_path / "out"
    sead = [sys.executable, "-m", "megatron_sead.commands.sead", "convert", "hf-to-megatron"]
    subprocess.run([*sead, "--input", models[1], "--output", str(checkpoint)], check=True, capture_output=True)
    assert evaluate([models[1], f"copy={checkpoint}"], benchmarks[:1], output) == 0
    weights = [json.loads((output / label / "gsm8k.jsonl").read_text().split("\n")[0]) for label in ("all", "copy")]
    assert weights[0] == weights[1]
    [converted] = (output / "copy").glob("hf-*")
    before = {path: path.stat().st_mtime_ns for path in converted.iterdir()}
    known.log = tmp_path / "log"
    assert evaluate([models[1], f"copy={checkpoint}"], benchmarks[:1], output) == 0
    assert {path: path.stat().st_mtime_ns for path in converted.iterdir()} == before
    assert not known.log.exists()
