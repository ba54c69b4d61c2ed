"""Whole runs with vLLM in the training ranks, beside the same runs with transformers; weights that did not arrive."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.rollouts.records import read_records, record_path

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.vllm_lane,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# Greedy, so that both engines write the same; a rate at which every update changes what is written; and an eps with
# which Adam does not make whole steps of rounding errors
RUN = [
    "training.steps=3",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.lr=1e-2",
    "training.adam_eps=1e-3",
    "training.lr_warmup_steps=0",
]
RUN += [
    "rollouts.temperature=0",
    "rollouts.samples_per_prompt=1",
    "rollouts.max_new_tokens=24",
    "checkpoints.interval=2",
]
RUN += ["evaluation.limit=4", "evaluation.samples=0"]
VLLM = ["rollouts.engine=vllm", "rollouts.enforce_eager=true", "rollouts.kv_cache_memory_bytes=33554432"]
TOGETHER = ["rollouts.tensor_parallel_size=2"]
SHARED_MEMORY = Path("/dev/shm")
TP2, DP2 = "parallel.tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size=1"


def launch(
    module: str, output: Path, *overrides: str, ranks: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What the ranks printed."""
    config = str(ROOT / "examples" / "configs" / "sead_tiny.yaml")
    where = ["--standalone", "--nproc-per-node", str(ranks), "-m", module, "--config", config]
    return subprocess.run(
        [sys.executable, "-m", "megatron_sead.launch", *where, f"output={output}", *RUN, *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def with_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("transformers") / "run"
    done = launch("megatron_sead.train", output, TP2)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([TP2, "rollouts.tensor_parallel_size=2"], id="both split a model"),
        pytest.param([DP2, "rollouts.tensor_parallel_size=1"], id="both have replicas"),
        pytest.param([TP2, "rollouts.tensor_parallel_size=1"], id="vllm has replicas of a split student"),
    ],
)
def test_a_greedy_run_is_that_of_transformers(layout: list[str], with_transformers: Path, tmp_path: Path) -> None:
    done = launch("megatron_sead.train", tmp_path / "run", *VLLM, *layout)
    assert done.returncode == 0, done.stderr
    assert "rollouts.engine=vllm and student: log-probabilities differ by" in done.stderr
    ours, theirs = metrics(tmp_path / "run"), metrics(with_transformers)
    for step in range(3):
        written, expected = (read_records(record_path(run, step)) for run in (tmp_path / "run", with_transformers))
        assert [r.response_token_ids for r in written] == [r.response_token_ids for r in expected]
        for name in ("loss", "grad_norm", "pass_rate"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-4), (step, name)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", with_transformers)]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]


@pytest.fixture
def left_behind() -> Iterator[None]:
    """Shared memory by the name that vLLM gives it, as a run has left it that was killed."""
    file = SHARED_MEMORY / "-tp:0-[0-1]-cpushm_0"
    made = not file.exists()
    file.touch()
    yield
    if made:
        file.unlink()


@pytest.mark.usefixtures("left_behind")
def test_a_rank_that_fails_alone_within_a_replica_ends_all_at_once(tmp_path: Path) -> None:
    """Its peer waits in vLLM for it, minutes long: the student cannot be saved, and no time is lost."""
    began, before = time.monotonic(), set(SHARED_MEMORY.iterdir())
    done = launch("tests.rollouts.faulty_vllm", tmp_path / "run", *VLLM, TP2, *TOGETHER, FAULT="dies")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = (
        "error: rollouts.engine='vllm': RuntimeError: out of memory; the other ranks with this copy of the model still "
    )
    assert line.startswith(f"{told}wait in it for rank 1, so that nothing can be saved; the same command continues")
    assert time.monotonic() - began < 300
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not [file for file in set(SHARED_MEMORY.iterdir()) - before if "tp:" in file.name]


@pytest.mark.parametrize("fault", ["left out", "old", "dies"])
def test_an_engine_at_fault_ends_the_run_in_one_line(fault: str, tmp_path: Path) -> None:
    # One of two dies; a weight is wrong for one as for two
    where: dict[str, Any] = {"ranks": 2 if fault == "dies" else 1}
    layout = TP2 if fault == "dies" else DP2
    done = launch("tests.rollouts.faulty_vllm", tmp_path / "run", *VLLM, layout, **where, FAULT=fault)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = {
        "left out": "rollouts.engine='vllm': model.layers.1.mlp.down_proj.weight: no new value came",
        "old": "rollouts.engine=vllm and the student do not agree: log-probabilities differ by",
        "dies": "rollouts.engine='vllm': RuntimeError: out of memory; saved after 1 step, the same command continues",
    }
    assert line.startswith(f"error: {told[fault]}"), line
    assert "Traceback" not in done.stderr
    if fault == "dies":
        assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()
        again = launch("megatron_sead.train", tmp_path / "run", *VLLM, TP2)
        assert again.returncode == 0, again.stderr
        assert "continuing at step 1" in again.stderr
