"""Layouts over several GPUs against one GPU, by the real entry point: replayed steps have the same losses, gradient
norms and final weights. And one rank that fails: all end at once, and its error is told once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.gpu.check import CUDA, DEVICE, Report
from tests.gpu.models import ROOT
from tests.gpu.tiny_pair import SETTINGS, TINY

STEPS = 3 if CUDA else 2
SMALL = [] if CUDA else ["training.global_batch_size=8", "training.micro_batch_size=2", "rollouts.max_new_tokens=8"]
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, VPP2 = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
BOUND = 1e-5  # relative, of the loss and the gradient's norm at every step
WEIGHTS_BOUND = 1e-3  # of how far the weights have moved: Adam divides by small gradients, rounding errors and all
AT_ONCE = 30.0  # seconds from a failure to the end of all ranks
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # ranks and settings
    "tp2 sequence parallel": (2, [TP2, SP]),
    "pp2": (2, [PP2]),
    "pp2 virtual 2": (2, [PP2, VPP2]),
    "dp2": (2, []),
    "tp2 x pp2 sequence parallel": (4, [TP2, PP2, SP]),
}


def tensor_and_sequence_parallel(report: Report) -> None:
    _compare(report, "tp2 sequence parallel")


def pipeline_stages(report: Report) -> None:
    _compare(report, "pp2")


def virtual_stages(report: Report) -> None:
    _compare(report, "pp2 virtual 2")


def data_parallel(report: Report) -> None:
    _compare(report, "dp2")


def tensor_parallel_stages(report: Report) -> None:
    _compare(report, "tp2 x pp2 sequence parallel")


def _compare(report: Report, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    if not _enough(report, ranks):
        return
    one = _on_one_gpu(report.folder)
    replay = ["rollouts.engine=replay", f"rollouts.path={one}"]
    run = report.folder / layout.replace(" ", "-")
    started = time.perf_counter()
    done = _launch(ranks, run, *replay, *settings)
    report.add(seconds=time.perf_counter() - started)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-800:]}")
    expected, found = _metrics(one), _metrics(run)
    for key in ("loss", "grad_norm"):
        apart = [abs(b[key] - a[key]) / abs(a[key]) for a, b in zip(expected, found, strict=True)]
        report.add(**{key: apart})
        report.expect(key, max(apart) <= BOUND, f"within {BOUND} of one GPU's at every step")
    apart_weights = _weights_apart(one, run)
    report.add(weights=apart_weights, step_seconds=[step["step_seconds"] for step in found])
    report.expect("weights", apart_weights <= WEIGHTS_BOUND, f"within {WEIGHTS_BOUND} of how far one GPU's have moved")


def error_on_one_rank(report: Report) -> None:
    """It is a user's error, in the midst of a step in which the other rank waits for a collective."""
    _fails_at_once(report, "mistaken", 2, "forced")


def killed_rank(report: Report) -> None:
    """It is killed from outside, and cannot say so."""
    _fails_at_once(report, "killed", 1, "SIGKILL")


def _fails_at_once(report: Report, policy: str, code: int, word: str) -> None:
    seconds, done = _failing(report, policy)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    report.add(seconds_to_end=seconds, exit_code=done.returncode, told=errors)
    report.expect("exit code", done.returncode == code, str(code))
    report.expect("told", len(errors) == 1 and word in errors[0], f"one line, with {word!r}")
    report.expect("ends", seconds <= AT_ONCE, f"all within {AT_ONCE:.0f} s of the failure")


def _failing(report: Report, policy: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A run whose last rank fails in its first step; seconds from then to its end. None of its ranks may live on."""
    if not _enough(report, 2):
        raise RuntimeError("two GPUs are needed")
    marker = report.folder / f"{policy}.failed"
    os.environ["FAILURE_MARKER"] = str(marker)
    done = _launch(2, report.folder / policy, f"policy.name=tests.gpu.failing_policies:{policy}")
    ended = time.time()
    if not marker.exists():
        raise RuntimeError(f"nothing has failed; exit code {done.returncode}: {done.stderr[-800:]}")
    left = [process.pid for process in psutil.Process().children(recursive=True)]
    report.expect("gone", not left, "no process of the run lives on")
    return ended - float(marker.read_text()), done


def _enough(report: Report, ranks: int) -> bool:
    there = torch.cuda.device_count() if CUDA else ranks
    if there < ranks:
        report.add(skipped=f"{ranks} GPUs are needed, {there} are visible")
    return there >= ranks


def _on_one_gpu(folder: Path) -> Path:
    """The run that all others replay; whichever check is first makes it."""
    run = folder / "one"
    if not (run / "student-hf").is_dir():
        done = _launch(1, run)
        if done.returncode:
            raise RuntimeError(f"one GPU: exit code {done.returncode}: {done.stderr[-800:]}")
    return run


def _launch(ranks: int, output: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_sead.launch", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_sead.train", "--config", str(ROOT / "examples/configs/sead_tiny.yaml"), *SETTINGS]
    command += [*SMALL, f"training.steps={STEPS}", "training.lr_warmup_steps=0", "checkpoints.interval=0"]
    command += [f"device={DEVICE.type}", f"output={output}", *settings]
    environment = os.environ | ({} if CUDA else {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    output.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return done


def _metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == STEPS
    return lines


def _weights_apart(one: Path, other: Path) -> float:
    """Distance of two runs' students, of the distance that the first has moved."""
    before = load_file(TINY / "student" / "model.safetensors")
    a, b = (load_file(run / "student-hf" / "model.safetensors") for run in (one, other))
    apart = sum((b[name].double() - a[name].double()).square().sum() for name in before)
    moved = sum((a[name].double() - before[name].double()).square().sum() for name in before)
    return float((apart / moved) ** 0.5)
