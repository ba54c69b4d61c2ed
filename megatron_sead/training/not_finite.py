"""Steps whose numbers are not finite: found on any rank, skipped on all, told by rank.

The rule of a skipped step. Weights, Adam's moments and its count of updates stand still, and so do running zone
thresholds: nothing that was computed in the step enters them. The schedule goes on, so that step n has the learning
rate of step n whatever came before; so do curriculum and competence, which have seen grades of whole answers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sead.checkpoints.manifest import from_all_ranks
from megatron_sead.files.durable import replace_text
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.training.optimizer import optimizer_parts

FOLDER = "not-finite"
KEPT = 20  # steps of a run whose batches are kept; of later ones metrics.jsonl tells alone
LARGEST = torch.finfo(torch.float32).max

Report = dict[str, Any]  # of one rank: its place, its gradients' norm, what it found


def gather_reports(
    parallel: ParallelContext,
    student: list[torch.nn.Module],
    problem: str | None,
    *,
    loss: float | None = None,
    grad_norm: float | None = None,
) -> list[Report] | None:
    """None on every rank when all numbers of all ranks are finite; else every rank's report. Collective over all.

    Args:
        student: chunks, of which a report says how large they are.
        problem: what this rank found before, in words.
        loss: of the step.
        grad_norm: of this rank's share of the gradients. Squares of norms are summed over the ranks in fp32 when
            gradients are clipped, so a norm whose square overflows is not finite either.
    """
    bad = problem is not None or (loss is not None and not math.isfinite(loss))
    square = 0.0 if grad_norm is None else grad_norm * grad_norm
    totals = torch.tensor([float(bad), square], dtype=torch.float64)
    dist.all_reduce(totals, group=parallel.control)
    if totals[0] == 0 and bool(totals[1] < LARGEST):
        return None
    report = {
        "rank": parallel.rank,
        "data": parallel.dp_rank,
        "context": parallel.cp_rank,
        "tensor": parallel.tp_rank,
        "pipeline": parallel.pp_rank,
        "loss": _plain(loss),
        "grad_norm": _plain(grad_norm),
        "weight_norm": _plain(_norm([p.detach() for chunk in student for p in chunk.parameters()])),
        "problem": problem,
    }
    return from_all_ranks(report, parallel.control)


def describe(reports: list[Report]) -> str:
    """The first thing that a rank found, in words."""
    for report in reports:
        if report["problem"] is not None:
            return f"rank {report['rank']}: {report['problem']}"
    norms = {report["rank"]: report["grad_norm"] for report in reports if isinstance(report["grad_norm"], str)}
    if norms:
        rank, norm = next(iter(norms.items()))
        return f"rank {rank}: the norm of its gradients is {norm}"
    return f"the loss is {reports[0]['loss']}, gradient norms are {[report['grad_norm'] for report in reports]}"


def own_grad_norm(optimizer: Any) -> float:
    """Norm of the gradients that this rank's optimizer is about to apply, replicas included. Call it after
    ``prepare_grads``."""
    parts = optimizer_parts(optimizer)
    return _norm([p.grad for part in parts for p in part.get_parameters() if p.grad is not None])


def weights_are_finite(chunks: list[Any], parallel: ParallelContext) -> bool:
    """Are all weights of all ranks, wherever they are? Collective over all."""
    bad = torch.zeros((), device=parallel.device)
    for chunk in chunks:
        for parameter in chunk.parameters():
            # The largest is NaN where one is: a reduction, without truth values for each weight of the head
            largest = torch.linalg.vector_norm(parameter.detach(), ord=math.inf)
            bad += (~largest.isfinite()).to(bad.device)
    flag = (bad > 0).cpu().int()
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel.control)
    return not bool(flag)


def folder_of(run_directory: Path, step: int) -> Path:
    """Where a skipped step's batch and reports are."""
    return run_directory / FOLDER / f"step-{step:08d}"


def write_reports(run_directory: Path, step: int, reports: list[Report]) -> Path | None:
    """Write ``ranks.json`` in the step's folder, on the first rank, and return the folder; None where enough steps are
    kept."""
    folder = folder_of(run_directory, step)
    there = [entry for entry in folder.parent.iterdir() if entry != folder] if folder.parent.is_dir() else []
    if len(there) >= KEPT:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "ranks.json", json.dumps(reports, indent=1) + "\n")
    return folder


def _norm(tensors: list[torch.Tensor]) -> float:
    """L2 norm of all elements of all tensors; each tensor's is taken in fp32."""
    if not tensors:
        return 0.0
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]).double().norm().item()


def _plain(value: float | None) -> float | str | None:
    """A number as JSON can hold it: one that is not finite becomes text."""
    return value if value is None or math.isfinite(value) else str(value)
