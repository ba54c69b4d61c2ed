"""verify, roundtrip, inspect and truncate as commands: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import faults
from tests.conftest import make_olmo3

# One process for all commands: starting one takes longer than any of them
DRIVER = """
import json, sys
from megatron_sead.commands.convert import app
from typer.testing import CliRunner

answers = {}
for name, arguments in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(app, arguments)
    answers[name] = (result.exit_code, result.stdout, result.stderr)
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, tuple[int, str, str]]:
    """Of each command: exit code, stdout, stderr."""
    model = faults.to_bf16(make_olmo3(folder / "model"))
    for name in ("window", "bit"):
        (folder / name).mkdir()
    checkpoint = faults.convert(model, folder / "megatron")
    other_window = faults.window_off_by_one(model, folder / "window")
    other_bit = faults.lowest_bit_flipped(model, folder / "bit")
    commands: dict[str, list[Any]] = {
        "same": ["verify", "--hf", model, "--megatron", checkpoint],
        "window": ["verify", "--hf", model, "--megatron", other_window, "--tokens", 40],
        "config alone": ["verify", "--hf", model, "--megatron", other_window, "--tokens", 0],
        "bit": ["verify", "--hf", model, "--megatron", other_bit, "--tokens", 0],
        "mistake": ["verify", "--hf", model, "--megatron", checkpoint, "--tokens", 9],
        "truncate": ["truncate", "--input", model, "--layers", 2, "--output", folder / "short"],
        "shapes": ["verify", "--hf", folder / "short", "--megatron", checkpoint, "--tokens", 40],
        "inspect": ["inspect", folder / "short"],
        "roundtrip": ["roundtrip", "--input", folder / "short", "--workdir", folder],
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps({k: list(map(str, v)) for k, v in commands.items()})],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str, str]] = json.loads(done.stdout.rpartition("ANSWERS")[2])
    return found


def test_verify_says_that_it_is_the_same_model(answers: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = answers["same"]
    assert code == 0
    assert out.splitlines()[-1] == "the same model"
    assert "tensors: 36 of 36 the same, bit for bit" in out
    assert "log-probabilities, 272 tokens x vocabulary" in out
    assert "layer 2 (full)" in out


def test_verify_says_what_differs(answers: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = answers["window"]
    assert code == 1
    assert "config: sliding_window: 7 for 6" in out
    assert "the first that differs: layer 0 (sliding)" in out
    assert out.splitlines()[-1] == "not the same model"


def test_a_configuration_that_differs_is_another_model(answers: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = answers["config alone"]
    assert code == 1
    assert "tensors: 36 of 36 the same" in out


def test_verify_names_the_tensor(answers: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = answers["bit"]
    assert code == 1
    assert f"{faults.VICTIM}: 1 of 4,096 elements differ, the first at [1, 2]" in out
    assert "log-probabilities" not in out


def test_verify_refuses_to_compare_other_shapes(answers: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = answers["shapes"]
    assert code == 1
    assert "config: num_layers: 3 for 2" in out and "other shapes" in out


def test_a_mistake_is_one_line(answers: dict[str, tuple[int, str, str]]) -> None:
    code, _, err = answers["mistake"]
    assert code == 2
    assert err.splitlines()[-1].startswith("error: --tokens 9: must be more than 16")


def test_truncate_and_inspect(answers: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = answers["truncate"]
    assert (code, out.split(": ")[1][:8]) == (0, "2 layers")
    code, out, _ = answers["inspect"]
    assert code == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["layers"].strip() == "2 (2 sliding, 0 full)"
    assert lines["dtype"].strip() == "bfloat16"


def test_roundtrip_leaves_nothing(answers: dict[str, tuple[int, str, str]], folder: Path) -> None:
    code, out, _ = answers["roundtrip"]
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("tensors")] == ["0"]
    assert {path.name for path in folder.iterdir()} == {"model", "window", "bit", "megatron", "short"}
