"""A run writes into its own directory, and into no other's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sead.config.checks import (
    check_output,
)
from megatron_sead.config.run import dump_config
from megatron_sead.errors import UserError
from tests.config.test_run import config


def test_an_output_directory_takes_the_same_run_in_another_layout_and_no_other_run(tmp_path: Path) -> None:
    here = f"output={tmp_path}"
    check_output(config(here))  # empty
    (tmp_path / "config.yaml").write_text(dump_config(config(here)))
    check_output(config(here, "parallel.tensor_model_parallel_size=2", "training.micro_batch_size=4", "device=cpu"))
    check_output(config(here, "training.micro_batch_tokens=9000"))
    both = "another run: seed is 0 there and 1 here, training.steps is 10 there and 11 here; choose another output"
    with pytest.raises(UserError, match=both):
        check_output(config(here, "seed=1", "training.steps=11"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("student.system_prompt", "Count."),
        ("teacher.system_prompt", "Count."),
        ("prompts.instruction", "x"),
        ("policy.name", "opd"),
        ("zones.shares", "[60, 30, 10]"),
        ("annealing.start", "0.5"),
        ("curriculum.patience", "7"),
        ("rollouts.temperature", "0.5"),
        ("rollouts.engine", "replay"),
        ("training.lr", "0.5"),
        ("training.precision", "fp32"),
    ],
)
def test_what_a_run_computes_does_not_change_on_resume(tmp_path: Path, setting: str, value: str) -> None:
    other = [f"{setting}={value}", *(["rollouts.path=recorded"] if value == "replay" else [])]
    (tmp_path / "config.yaml").write_text(dump_config(config(f"output={tmp_path}")))
    with pytest.raises(UserError, match=f"another run: .*{setting} is "):
        check_output(config(f"output={tmp_path}", *other))


@pytest.mark.parametrize(
    ("role", "place", "output"),
    [
        ("student", "run/student-hf", "run"),
        ("teacher", "run/student-hf", "run"),
        ("teacher", "run/student-hf/inner", "run"),
        ("student", "run/checkpoints", "run"),
        ("teacher", "run", "run"),
        ("student", "model", "model/run"),
        ("teacher", "link", "model/run"),
        ("rollouts", "run", "run"),
    ],
)
def test_a_run_does_not_write_where_it_reads(tmp_path: Path, role: str, place: str, output: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    read = [f"{role}.path={tmp_path / place}", *(["rollouts.engine=replay"] if role == "rollouts" else [])]
    with pytest.raises(UserError, match="which is read"):
        check_output(config(f"output={tmp_path / output}", *read))
    check_output(config(f"output={tmp_path / 'other'}", *read))


def test_an_output_that_is_a_file_or_holds_an_unreadable_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_output(config(f"output={tmp_path / 'file'}"))
    (tmp_path / "config.yaml").write_text("stepz: 1\n")
    with pytest.raises(UserError, match="not valid here"):
        check_output(config(f"output={tmp_path}"))


def test_an_output_that_overlaps_an_input_is_refused(tmp_path: Path) -> None:
    for folder in ("model", "runs/a/rollouts", "runs/a/student-hf"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/a/prompts.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")

    def check(output: str, *overrides: str) -> None:
        check_output(config(f"output={tmp_path / output}", *overrides))

    model, run = f"student.path={tmp_path}/model", f"{tmp_path}/runs/a"
    for output, overrides, told in [
        ("model", [model], "student.path"),
        ("link/run", [model], "student.path"),
        ("runs/a", [f"teacher.path={run}/student-hf"], "teacher.path"),
        ("runs/a", ["rollouts.engine=replay", f"rollouts.path={run}"], "rollouts.path"),
        ("runs/a", ["rollouts.engine=replay", f"rollouts.path={run}/rollouts"], "rollouts.path"),
        ("runs/a/again", ["rollouts.engine=replay", f"rollouts.path={run}"], "rollouts.path"),
    ]:
        with pytest.raises(UserError, match=f"overlaps {told}="):
            check(output, *overrides)
    for path in ("rollouts", "student-hf"):
        (tmp_path / "runs/a" / path).rmdir()
    check("runs/a", model, f"prompts.path={run}/prompts.jsonl")
    check("runs/b", model, f"teacher.path={tmp_path}/link")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "student-hf", "tensorboard"])
def test_files_that_no_run_wrote_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds {name}, which a run would write"):
        check_output(config(f"output={tmp_path}"))
    if name == "student-hf":
        (tmp_path / "config.yaml").write_text(dump_config(config(f"output={tmp_path}")))
        with pytest.raises(UserError, match="was not written by this tool"):
            check_output(config(f"output={tmp_path}"))
