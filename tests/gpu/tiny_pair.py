"""Check 5: the tiny pair through the real entry point: the same steps on a CPU and on CUDA, live, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.gpu.check import CUDA, DEVICE, Report
from tests.gpu.models import ROOT

TINY = ROOT / "examples" / "tiny"
STEPS = 3
BOUND = 1e-5  # relative, of the loss and the gradient's norm
SETTINGS = [
    *(f"{role}.path={TINY / role}" for role in ("student", "teacher")),
    f"prompts.path={TINY / 'prompts.jsonl'}",
    "parallel.tensor_model_parallel_size=1",
    f"training.steps={STEPS}",
    "training.global_batch_size=32",
    "training.micro_batch_size=8",
    "checkpoints.interval=2",
    "evaluation.path=null",
    "reporting.tensorboard=false",
]


def tiny_pair(report: Report) -> None:
    """Runs that do not depend on each other run side by side: nothing here is timed."""
    folder = report.folder / "tiny"
    folder.mkdir()
    device, reference = DEVICE.type, folder / "cpu"
    replay = ["rollouts.engine=replay", f"rollouts.path={reference}"]
    with ThreadPoolExecutor(4) as pool:
        runs = {"live": pool.submit(_train, folder / "live", device)}
        _train(reference, "cpu")
        runs |= {"replay": pool.submit(_train, folder / "replay", device, *replay)}
        runs |= {"cpu-replay": pool.submit(_train, folder / "cpu-replay", "cpu", *replay)}
        for name, of in (("resumed", "replay"), ("resumed-from-cpu", "cpu-replay")):
            runs[name] = pool.submit(_resume, runs[of], folder / name, device, *replay)
    for name, run in runs.items():
        report.attempt(name, partial(_compare, report, name, reference, run))


def _resume(run: Future[Path], copy: Path, device: str, *settings: str) -> Path:
    """Do a finished run's last step again, on this device, from the checkpoint before it."""
    return _train(_before_the_last_step(run.result(), copy), device, *settings)


def _train(output: Path, device: str, *settings: str) -> Path:
    """One run. RuntimeError with the end of what it printed when it fails."""
    command = [sys.executable, "-m", "megatron_sead.train", "--config", str(ROOT / "examples/configs/sead_tiny.yaml")]
    command += [*SETTINGS, f"device={device}", f"output={output}", *settings]
    environment = os.environ | ({} if CUDA else {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    output.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{output.name}: exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return output


def _before_the_last_step(run: Path, copy: Path) -> Path:
    """A copy of a finished run, as it was when its newest checkpoint but one was written."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "student-hf")
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    (copy / "summary.json").unlink()
    return copy


def _compare(report: Report, name: str, reference: Path, future: Future[Path]) -> None:
    """Step by step, against the same tokens. A live run writes tokens of its own: its first step alone is the same
    on both devices, as long as no sampled token lies on an edge."""
    run = future.result()
    expected, found = _metrics(reference), _metrics(run)
    for key in ("loss", "grad_norm", "student_entropy"):
        apart = [abs(b[key] - a[key]) / abs(a[key]) for a, b in zip(expected, found, strict=True)]
        report.add(**{f"{name} {key}": apart})
        if name != "live" and key != "student_entropy":
            report.expect(f"{name} {key}", max(apart) <= BOUND, f"within {BOUND} of the reference at every step")
    if name.startswith("resumed"):
        log = run.with_suffix(".log").read_text(encoding="utf-8")
        report.expect(f"{name} at", f"continuing at step {STEPS - 1}" in log, "it goes on from the checkpoint")
    report.expect(name, len(found) == STEPS and (run / "student-hf").is_dir(), "the run ends with its student")


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
