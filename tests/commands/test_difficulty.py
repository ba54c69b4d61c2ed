"""The command as users run it: batches do not matter, it continues where it stopped, mistakes are one line."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import Dataset

from megatron_sead.commands.difficulty import main
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.evaluation.asking import Questions
from megatron_sead.evaluation.difficulty import load_estimate_settings
from megatron_sead.evaluation.tally import Graded, Tally
from megatron_sead.grading.grader import GRADER_VERSION
from megatron_sead.launch.ownership import sole_owner
from megatron_sead.prompts.problems import read_problems
from tests.conftest import make_olmo3
from tests.distributed.programs import run_program

TOOL = Path(__file__).parents[2] / "tools" / "estimate_difficulty.py"
PROMPTS = 12


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The answers are single characters, so that a random model is right now and then."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "answer": i % 10, "note": "kept"} for i in range(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(model: Path, prompts: Path, output: Path, *overrides: str) -> list[str]:
    return [
        *("--model", str(model), "--prompts", str(prompts), "--output", str(output)),
        *("prompts.template=plain", "rollouts.max_new_tokens=1", "rollouts.temperature=3", "device=cpu", *overrides),
    ]


def difficulties(output: Path) -> list[float]:
    return [json.loads(line)["difficulty"] for line in output.read_text().splitlines()]


def test_rows_keep_their_fields_and_batches_do_not_matter(tiny_olmo3: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "with.jsonl"
    done = run_program(TOOL, *options(tiny_olmo3, prompts, output, "samples=64"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    originals = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "difficulty"} for row in rows] == originals
    assert all(0 <= row["difficulty"] <= 1 and (row["difficulty"] * 64).is_integer() for row in rows)
    assert {row["difficulty"] for row in rows} != {1.0}
    provenance = json.loads((tmp_path / "out" / "with.jsonl.provenance.json").read_text())
    assert (provenance["samples"], provenance["seed"], provenance["grader_version"]) == (64, 0, GRADER_VERSION)
    assert provenance["sampling"] == {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 1}
    names = ["with.jsonl", "with.jsonl.answers.jsonl", "with.jsonl.provenance.json"]
    assert sorted(path.name for path in output.parent.iterdir()) == names
    assert "difficulty  prompts\n     0.000" in done.stdout
    assert f"{PROMPTS} prompts, mean difficulty" in done.stdout

    # Continued from half of the answers and a line that a kill cut short, in other batches, by two ranks
    answers = (output.parent / names[1]).read_bytes()
    kept, other = tmp_path / "other.jsonl.answers.jsonl", tmp_path / "other.jsonl"
    kept.write_bytes(answers[: len(answers) // 2])
    two = ["--nproc-per-node", "2"]
    done = run_program(TOOL, *options(tiny_olmo3, prompts, other, "samples=64", "rollouts.batch_size=48"), *two)
    assert done.returncode == 0, done.stderr
    assert other.read_text() == output.read_text()
    assert kept.read_bytes().splitlines()[:100] == answers.splitlines()[:100]
    assert sorted(kept.read_bytes().splitlines()) == sorted(answers.splitlines())


def test_ctrl_c_loses_nothing(tiny_olmo3: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.answers.jsonl"
    # One prompt at a time with many samples, so that the signal finds it at work
    arguments = options(tiny_olmo3, prompts, output, "samples=400", "rollouts.batch_size=16")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    command, environment = [sys.executable, str(TOOL), *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not (partial.exists() and partial.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert 1 < partial.read_text().count("\n") < 400 * PROMPTS + 1
    assert run_program(TOOL, *arguments).returncode == 0
    assert len(difficulties(output)) == PROMPTS


def test_mistakes_are_one_line(
    tiny_olmo3: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / "begun.jsonl.answers.jsonl").write_text('{"measurement": {"seed": 1}}\n')
    cases: list[tuple[Path, Path, Path, list[str], str]] = [
        (tiny_olmo3, tmp_path / "no.jsonl", output, [], "no such file"),
        (tmp_path, prompts, output, [], "no tokenizer there"),
        (tiny_olmo3, prompts, output, ["sample=3"], "did you mean samples?"),
        (tiny_olmo3, prompts, output, ["rollouts.temperature=0"], "samples=8: must be 1"),
        (
            tiny_olmo3,
            prompts,
            output,
            ["rollouts.engine=replay", "rollouts.path=x"],
            "must be an engine that generates",
        ),
        (tiny_olmo3, prompts, prompts, [], "exists already"),
        (tiny_olmo3, prompts, tmp_path / "begun.jsonl", [], "was begun with"),
    ]
    for model, asked, written, overrides, message in cases:
        with pytest.raises(SystemExit) as stopped:
            main(written, model, str(asked), None, ["prompts.template=plain", "rollouts.max_new_tokens=1", *overrides])
        errors = capsys.readouterr().err
        assert (stopped.value.code, message in errors) == (2, True), errors
        assert len(errors.strip().splitlines()) == 1
    assert not output.exists()


def test_exit_code_of_the_command(prompts: Path, tmp_path: Path) -> None:
    done = run_program(TOOL, *options(tmp_path, prompts, tmp_path / "out.jsonl"))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt passes every time, without a model; the list says which ones were measured."""
    measured: list[str] = []

    class Solver:
        def ask_missing(self, questions: Questions, tally: Tally, _: object) -> None:
            for prompt, sample in questions.asked:
                if (prompt.id, sample) not in tally.answers:
                    measured.append(prompt.id)
                    tally.add([(Graded(prompt.id, sample, 1, finished=True, correct=True), "")])

    @contextmanager
    def examiner(*_: object) -> Iterator[Solver]:
        yield Solver()

    monkeypatch.setattr("megatron_sead.evaluation.difficulty.examiner", examiner)
    return measured


def estimate(model: Path, prompts: Path, output: Path, *overrides: str) -> int:
    """In this process; the exit code."""
    try:
        main(output, model, str(prompts), None, ["prompts.template=plain", "rollouts.max_new_tokens=1", *overrides])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_fields_that_are_not_used_are_written_as_they_stood(
    tiny_olmo3: Path, tmp_path: Path, solved: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    kept = '"prompt": "1+1=", "answer": 12345678901234567890.0, "score": 1.10, "big": 1E+400'
    prompts.write_text(f'{{{kept}, "mean": NaN}}\n{{{kept}, "difficulty": 0.5}}\n')
    assert estimate(tiny_olmo3, prompts, output) == 0
    assert output.read_text() == f'{{{kept}, "mean": null, "difficulty": 0.0}}\n{{{kept}, "difficulty": 0.0}}\n'
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    for note, part in zip(notes, ["1 of 2 rows have the prompt", "1 row has a 'd", "null in 1 row,"], strict=True):
        assert part in note
    answers = [problem.answers for problem in read_problems(PromptSettings(path=str(output)))]
    assert answers == [("12345678901234567890",)] * 2


def test_the_settings_of_a_training_run_are_taken(tiny_olmo3: Path, prompts: Path, tmp_path: Path) -> None:
    """What measures is what trains: the student, its prompts, its rollouts; --model and overrides win."""
    run = tmp_path / "run.yaml"
    run.write_text(
        f"output: runs/x\nseed: 3\nstudent: {{path: {tiny_olmo3}, stop_token_ids: [1]}}\nteacher: {{path: teacher}}\n"
        f"prompts: {{path: {prompts}, template: plain}}\nrollouts: {{temperature: 0.5, max_new_tokens: 7}}\n"
        "training: {steps: 5, global_batch_size: 4, precision: fp32}\ndevice: cpu\n"
    )
    settings = load_estimate_settings(run, ["samples=2", "rollouts.max_new_tokens=9", "training.precision=bf16"])
    assert (settings.model.path, settings.model.stop_token_ids) == (tiny_olmo3, [1])
    assert (settings.prompts.path, settings.prompts.template) == (str(prompts), "plain")
    assert (settings.rollouts.temperature, settings.rollouts.max_new_tokens) == (0.5, 9)
    assert (settings.samples, settings.seed, settings.device, settings.precision) == (2, 3, "cpu", "bf16")
    assert load_estimate_settings(run, ["model.path=other"]).model.path == Path("other")
    with pytest.raises(UserError, match=r"^sampels: unknown setting; did you mean samples\?$"):
        load_estimate_settings(run, ["sampels=2"])
    run.write_text(run.read_text().replace("steps: 5", "stepz: 5"))
    with pytest.raises(UserError, match=r"training.stepz: unknown setting; did you mean training.steps\?"):
        load_estimate_settings(run, [])


def test_what_cannot_be_written_is_told_before_anything_is_measured(
    tiny_olmo3: Path, tmp_path: Path, solved: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good, image = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    good.write_text('{"prompt": "1+1=", "answer": 2, "difficulty_of": 1}\n')
    row = {"prompt": "1+1=", "answer": "2", "day": datetime.date(2020, 1, 1), "image": {"bytes": b"\xff"}}
    Dataset.from_list([row]).to_parquet(str(image))
    (tmp_path / "file").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "noted.jsonl.provenance.json").write_text("{}")
    (tmp_path / "mine.jsonl.answers.jsonl").write_text("my notes")
    cases = [
        (image, "out.jsonl", [], "row 1: 'image' holds bytes, which a JSONL file cannot hold"),
        (good, "file/out.jsonl", [], "out.jsonl: cannot be written"),
        (good, "link.jsonl", [], "link.jsonl: exists already"),
        (good, "noted.jsonl", [], "noted.jsonl.provenance.json: exists already"),
        (good, "mine.jsonl", [], "mine.jsonl.answers.jsonl, line 1: not written by this command"),
        (good, "out.parquet", [], "JSON lines are written, not parquet"),
        (good, "out.jsonl", ["prompts.difficulty_field=answer"], "prompts.difficulty_field=answer: must not be"),
    ]
    before = contents(tmp_path)
    for prompts, name, overrides, message in cases:
        assert estimate(tiny_olmo3, prompts, tmp_path / name, *overrides) == 2
        errors = capsys.readouterr().err
        assert message in errors.splitlines()[-1], errors
        assert "Traceback" not in errors
    assert contents(tmp_path) == before
    assert solved == []


def contents(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def kept_answers(output: Path) -> Path:
    return output.with_name(output.name + ".answers.jsonl")


def test_answers_are_continued_with_the_same_prompts_alone(
    tiny_olmo3: Path, prompts: Path, tmp_path: Path, solved: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    assert estimate(tiny_olmo3, prompts, other) == 0
    lines = kept_answers(other).read_text().splitlines(keepends=True)
    halves = [line.replace('"correct": true', '"correct": false') for line in lines[1:5]] + lines[5:9]
    kept_answers(output).write_text(lines[0] + "".join(halves))
    text = prompts.read_text()
    for changed in (
        text.replace('"answer": 3', '"answer": 4'),
        text + text.replace("+", "-"),
        text[text.index("\n") + 1 :],
    ):
        prompts.write_text(changed)
        assert estimate(tiny_olmo3, prompts, output) == 2
        assert "was begun with prompts_content='12 prompts, sha256" in capsys.readouterr().err
    prompts.write_text(text.replace("kept", "changed, and not used"))
    solved.clear()
    assert estimate(tiny_olmo3, prompts, output) == 0
    assert solved == [str(i) for i in range(1, PROMPTS) for _ in range(8)]
    assert difficulties(output) == [0.5] + [0.0] * (PROMPTS - 1)


def test_other_weights_are_another_measurement(
    tiny_olmo3: Path, prompts: Path, tmp_path: Path, solved: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert estimate(tiny_olmo3, prompts, output) == 0
    output.unlink()
    (tmp_path / "out.jsonl.provenance.json").unlink()
    other = make_olmo3(tmp_path / "other", seed=1)
    assert estimate(other, prompts, output) == 2
    assert "out.jsonl.answers.jsonl: was begun with weights=" in capsys.readouterr().err
    shutil.copytree(tiny_olmo3, tmp_path / "copy")
    assert estimate(tmp_path / "copy", prompts, output) == 0


def test_prompts_are_counted_by_level_and_source(
    tiny_olmo3: Path, tmp_path: Path, solved: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "prompt": f"{i}=",
            "answer": i,
            "level": [10, 2][i % 2],
            "source": {"place": i, "data_source": f"set {i // 6}"},
        }
        for i in range(PROMPTS)
    ]  # as sead prepare writes
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert estimate(tiny_olmo3, prompts, tmp_path / "out.jsonl") == 0
    told = capsys.readouterr().out
    assert (
        told.index("by level")
        < told.index("│ 2 ")
        < told.index("│ 10 ")
        < told.index("by data_source")
        < told.index("set 1")
    )


def test_two_commands_do_not_write_one_output(
    tiny_olmo3: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "with.jsonl"
    with sole_owner(tmp_path / "with.jsonl.lock", "the first"), pytest.raises(SystemExit) as left:
        main(output, tiny_olmo3, str(prompts), overrides=["device=cpu"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --output={output}: in use by process {os.getpid()} on ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("with.jsonl")]
