"""The passes of one check, each in processes of its own, so that what one held is free for the next."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from megatron_sead.errors import UserError
from true_shapes.errors import Seen, merge
from true_shapes.model import TOKENS, Shape

WORKER = Path(__file__).with_name("worker.py")
PROGRAM = 0.8e9  # bytes of a process with torch, transformers and Megatron-Core, without tensors
# As resident as it is live; torch's and the matrix library's buffers go back to the system
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
# fp32 over the same weights: the two differ in the order of summation. A real fault is beyond 1e-2.
TOLERANCES = {"logits": 1e-4, "gradients": 1e-3}
# bf16: our distance from fp32 may exceed transformers' own by so much
MOST_OVER_TRANSFORMERS = 1.5


def memory_needed(shape: Shape, itemsize: int, processes: int) -> float:
    """Bytes of all processes of a pass: weights; a gradient, the reference's and a copy, for the largest weight;
    logits in fp32, six times, with their gradients; the programs."""
    largest = shape.largest * (itemsize + 2 * 4)
    return shape.parameters * itemsize + largest + 6 * 4 * TOKENS * shape.vocab + processes * PROGRAM


def disk_needed(shape: Shape) -> float:
    """Bytes of bf16 weights and fp32 gradients."""
    return shape.parameters * (2 + 4) + 4 * TOKENS * shape.vocab


def check(shape: Shape, dtype: str, tp: int, workdir: Path) -> dict[str, Any]:
    """Measure. Leaves nothing in `workdir`.

    Raises:
        UserError: not enough memory or disk for it, or a pass failed.
    """
    passes = ["reference", *(["transformers"] if dtype == "bf16" else []), "megatron"]
    processes = dict.fromkeys(passes, 1) | {"megatron": tp}
    itemsize = dict.fromkeys(passes, {"fp32": 4, "bf16": 2}[dtype]) | {"reference": 4}
    accounted = {kind: memory_needed(shape, itemsize[kind], processes[kind]) for kind in passes}
    _require("memory", max(accounted.values()), psutil.virtual_memory().available)
    _require(f"disk in {workdir}", disk_needed(shape), shutil.disk_usage(workdir).free)
    with tempfile.TemporaryDirectory(prefix=".true-shapes-", dir=workdir) as name:
        settings = {"folder": name, "shape": asdict(shape), "dtype": dtype}
        seen, seconds = {}, {}
        for kind in passes:
            began = time.monotonic()
            seen[kind] = _run(settings | {"kind": kind, "processes": processes[kind]})
            seconds[kind] = round(time.monotonic() - began, 1)
    result: dict[str, Any] = {"parameters": shape.parameters, "tokens": TOKENS, "seconds": seconds}
    result |= {kind: summary(seen[kind], seen["reference"]) for kind in passes[1:]}
    result["peak_gb"] = {kind: round(seen[kind].peak_bytes / 1e9, 2) for kind in passes}
    result["accounted_gb"] = {kind: round(bytes_ / 1e9, 2) for kind, bytes_ in accounted.items()}
    result["passed"] = passed(result)
    return result


def _require(what: str, needed: float, free: float) -> None:
    if free < needed:
        raise UserError(f"{what}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _run(settings: dict[str, Any]) -> Seen:
    processes = settings["processes"]
    threads = max(1, (os.cpu_count() or 1) // processes)
    path = Path(settings["folder"], f"{settings['kind']}.json")
    path.write_text(json.dumps(settings | {"threads": threads}))
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(processes)}
    workers = []
    try:
        for rank in range(processes):
            with path.with_suffix(f".log{rank}").open("w") as log:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER), str(path), str(rank)],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=log,
                    )
                )
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for rank, worker in enumerate(workers):
        if worker.returncode > 0 or not path.with_suffix(f".{rank}").exists():
            lines = path.with_suffix(f".log{rank}").read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {worker.returncode}"
            raise UserError(f"the {settings['kind']} pass failed on rank {rank}: {reason}")
    return merge([Seen.from_json(json.loads(path.with_suffix(f".{rank}").read_text())) for rank in range(processes)])


def summary(seen: Seen, reference: Seen) -> dict[str, Any]:
    """Distances from the reference, relative: of all logits, and of every weight's gradient."""
    gradients = {name: distance.relative() for name, distance in seen.gradients.items()}
    worst = max(gradients, key=lambda name: (math.isnan(gradients[name]["l2"]), gradients[name]["l2"]))
    return {
        "logits": seen.logits.relative(),
        "loss": abs(seen.loss / reference.loss - 1),
        "worst_gradient": {"name": worst, **gradients[worst]},
        "gradients_l2": {name: value["l2"] for name, value in gradients.items()},
    }


def passed(result: dict[str, Any]) -> bool:
    """Within tolerance: of the reference in fp32, of transformers' own rounding in bf16."""
    ours, theirs = result["megatron"], result.get("transformers")
    found = {"logits": ours["logits"]["l2"], "gradients": ours["worst_gradient"]["l2"]}
    if theirs is None:
        return all(value <= TOLERANCES[name] for name, value in found.items())
    allowed = {"logits": theirs["logits"]["l2"], "gradients": theirs["worst_gradient"]["l2"]}
    return all(value <= MOST_OVER_TRANSFORMERS * allowed[name] for name, value in found.items())
