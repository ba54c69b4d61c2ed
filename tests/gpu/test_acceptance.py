"""The script that a first GPU runs, here on a CPU with small sizes: it must never be the script that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import runner
from tests.gpu.runner import Check

ROOT = Path(__file__).parents[2]


def results_of(script: str, output: Path, *checks: str) -> tuple[list[dict[str, Any]], str]:
    """What a script of checks leaves, run on a CPU to its good end, and what it prints."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", f"tests/gpu/{script}", str(output), *checks],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()], done.stdout


def test_the_script_reports_every_check_at_once_and_in_a_table(tmp_path: Path) -> None:
    results, printed = results_of("acceptance.sh", tmp_path, "6", "9")
    assert [(result["check"], result["ok"]) for result in results] == [("6", True), ("9", True)]
    assert [json.loads(line) for line in printed.splitlines()[:2]] == results
    assert results[0]["numbers"]["worst_ratio"] < 1.5


def test_results_are_not_written_among_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "tiny_pair" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    for place in (tmp_path, theirs):
        assert runner.main(place, []) == 2
    assert capsys.readouterr().err.count("name a new or an empty folder") == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


def test_a_check_that_raises_or_hangs_says_so_and_keeps_what_it_measured(tmp_path: Path) -> None:
    raised = runner.run(Check("x", "kernels", "no_such_check", 60), tmp_path, 60)
    assert not raised["ok"] and "no_such_check" in raised["error"]
    hung = runner.run(Check("x", "kernels", "triton_kernels", 60), tmp_path, 0.1)
    assert not hung["ok"] and "still running after 0 s" in hung["error"]
    assert "no_such_check" in runner.table([raised, hung])
