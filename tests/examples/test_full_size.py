"""The script of the large run, at the size of the tiny pair: from prompts as released to a table of benchmarks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from megatron_sead.rollouts.records import read_records, record_path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"
pytestmark = [
    pytest.mark.vllm_lane,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def small_run(folder: Path, release: Path, *overrides: str) -> str:
    """What `SMALL=1 bash examples/run_sead_32b.sh` prints, which must end well."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "NNODES", "NODE_RANK")}
    environment |= {"SMALL": "1", "OUTPUT": str(folder), "RELEASE": str(release)}
    done = subprocess.run(
        ["bash", "examples/run_sead_32b.sh", *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_large_runs_script_goes_from_a_release_to_benchmarks_and_skips_what_is_done(tmp_path: Path) -> None:
    folder, release = tmp_path / "a folder", tmp_path / "release.jsonl"
    with (TINY / "prompts.jsonl").open() as file:
        lines = list(islice(file, 60))
    release.write_text("".join([*lines, *lines[:10]]))  # ten of them twice
    printed = small_run(folder, release)
    prepared = [json.loads(line) for line in (folder / "prompts.prepared.jsonl").read_text().splitlines()]
    assert 16 <= len(prepared) <= 60 and len({row["prompt"] for row in prepared}) == len(prepared)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prepared]
    assert len({row["difficulty"] for row in rows}) > 2  # measured: several pass rates
    assert len(read_records(record_path(folder / "run", 3))) == 16
    results = json.loads((folder / "run-benchmarks" / "results.json").read_text())
    assert "before" in json.dumps(results) and "teacher" in json.dumps(results)

    again = small_run(folder, release)
    assert "== prompts" in printed and "== prompts" not in again and "== difficulty" not in again
    assert "== training" in printed and "== training" not in again
    assert json.loads((folder / "run-benchmarks" / "results.json").read_text()) == results
