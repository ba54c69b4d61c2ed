"""What a benchmark writes takes the place of no file, and that is told before anything is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tool", "suffix", "more"),
    [
        ("benchmark_loss", ".png", []),
        ("benchmark_step", ".md", []),
        ("benchmark_rollouts", ".json", []),
        ("benchmark_packed", ".json", []),
        ("benchmark_conversion", ".json", ["--workdir", "."]),
        ("profile_step", "", ["--config", ROOT / "examples/configs/sead_tiny.yaml"]),
    ],
)
def test_a_file_that_is_there_stays(tool: str, suffix: str, more: list[str], tmp_path: Path) -> None:
    taken = tmp_path / f"figures{suffix}"
    taken.write_text("mine")
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", "--write", tmp_path / "figures", *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {taken}: exists already; choose another output, or move it away"
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]
