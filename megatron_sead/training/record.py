"""Writes what a step leaves on disk: a line of metrics, its rollouts with zones, and at intervals a checkpoint."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_sead.distillation.zone_shares import LETTERS
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.reporting.machine import peak_resident
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.rollouts.records import record_path, write_records
from megatron_sead.training.not_finite import weights_are_finite
from megatron_sead.training.parity import student_log_probs
from megatron_sead.training.run import Run
from megatron_sead.training.seen_tokens import Watch
from megatron_sead.training.skipping import remedy
from megatron_sead.training.step import StepResult
from megatron_sead.training.token_record import record_tokens
from megatron_sead.wording import counted

log = logging.getLogger(__name__)


def record_step(
    run: Run,
    step: int,
    rollouts: list[Rollout],
    correct: list[bool],
    alpha: float,
    watch: Watch,
    result: StepResult,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Write the step down; its metrics on every rank. Collective.

    Args:
        watch: which rollouts are recorded token by token.
        seconds: of the phases of the step, by the names of metrics.jsonl.
    """
    skipped = result.reports is not None
    metrics: dict[str, Any] = {"step": step, "skipped": skipped, "alpha": alpha} | result.metrics
    if skipped:
        metrics |= {
            "loss": None,
            "grad_norm": None,
            "response_tokens": sum(len(r.response_token_ids) for r in rollouts),
        }
    metrics |= run.rollout_metrics(rollouts, correct, step) | seconds
    metrics |= {
        "tokens_per_second": metrics["response_tokens"] / seconds["step_seconds"],
        "seconds": run.seconds(),
        "peak_memory": _peak_memory(run),
    }
    if not skipped:
        run.state.skipped_in_a_row = 0
        _warn_of_mismatch(run, step, metrics.get("sampling_log_prob_difference", 0.0))
    record_tokens(run, step, rollouts, correct, alpha, watch, result.tokens)
    interval = run.config.reporting.rollouts_interval
    if interval and step % interval == 0:
        _record_rollouts(run, step, rollouts, correct, result)
    if run.writer is not None:
        run.writer.write(metrics)
    return metrics


def _peak_memory(run: Run) -> float:
    """GiB, the most of any rank. Collective."""
    on_gpu = run.parallel.device.type == "cuda"
    most = torch.tensor(torch.cuda.max_memory_allocated() if on_gpu else peak_resident(), dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=run.parallel.control)
    return most.item() / 2**30


def _warn_of_mismatch(run: Run, step: int, difference: float) -> None:
    limit, expected = run.config.rollouts.mismatch_warning, run.config.rollouts.lag > 0
    if difference > limit and not expected and run.parallel.rank == 0 and not run.told_of_mismatch:
        run.told_of_mismatch = True
        log.warning(
            "step %d: log-probabilities of rollouts.engine=%s and the student differ by %.2g nats a token, "
            "more than rollouts.mismatch_warning=%g (told once)",
            step,
            run.config.rollouts.engine,
            difference,
            limit,
        )


def save(run: Run) -> None:
    """A checkpoint of everything that the next step depends on. Collective.

    Raises:
        UserError: the student is spoilt: weights, or log-probabilities of the probe, that are not finite. Nothing is
            written, so that no older checkpoint goes for it.
    """
    run.state.seconds, run.started = run.seconds(), time.perf_counter()
    run.state.probe_tokens = run.probe
    spoilt = None
    if not weights_are_finite(list(run.student_chunks), run.parallel):
        spoilt = "weights of the student are not finite"
    else:
        try:
            run.state.probe_log_probs = student_log_probs(run, run.probe).tolist()
        except NotFiniteNumbers as error:
            spoilt = str(error)
    if spoilt is not None:
        raise UserError(f"after {counted(run.state.step, 'step')}: {spoilt}; no checkpoint is written. {remedy(run)}")
    learner = run.learner
    run.store.save(
        run.state.step,
        run.student_chunks,
        learner.optimizer,
        learner.scheduler,
        run.state_dict(),
        run.inputs.record,
    )


def _record_rollouts(run: Run, step: int, rollouts: list[Rollout], correct: list[bool], result: StepResult) -> None:
    """Write rollouts/step-N.jsonl on the first rank, with the zones from the ranks that saw the tokens."""
    mine: dict[int, str] = {}
    seen = result.tokens
    if seen is not None and run.parallel.tp_rank == run.parallel.cp_rank == 0:
        letters = [LETTERS[zone] for zone in seen.zones.tolist()]
        for index, letter in zip(seen.tokens.rollout_index.tolist(), letters, strict=True):
            mine[index] = mine.get(index, "") + letter
    parts: list[dict[int, str]] | None = [{}] * run.parallel.world_size if run.parallel.rank == 0 else None
    dist.gather_object(mine, parts, dst=0, group=run.parallel.control)
    if parts is None:
        return
    zones = {index: text for part in parts for index, text in part.items()}
    extras = [
        {"response": run.tokenizer.decode(rollout.response_token_ids), "correct": right, "zones": zones.get(index, "")}
        for index, (rollout, right) in enumerate(zip(rollouts, correct, strict=True))
    ]
    write_records(record_path(run.config.output, step), rollouts, extras)
