"""What a step leaves on disk: a line of metrics, its rollouts with their zones, and now and then a checkpoint."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from megatron_sead.rollouts import Rollout, record_path, write_records
from megatron_sead.training.identity import trained_log_probs
from megatron_sead.training.run import Run
from megatron_sead.training.step import StepResult


def record_step(
    run: Run,
    step: int,
    rollouts: list[Rollout],
    correct: list[bool],
    alpha: float,
    result: StepResult,
    clock: list[float],
) -> dict[str, Any]:
    """Write the step down; its metrics on every rank. Collective.

    Args:
        clock: when the step began, had its rollouts, had trained, and had given the engine its weights.
    """
    began, generated, trained, synchronized = clock
    metrics: dict[str, Any] = {"step": step, "alpha": alpha} | result.metrics
    metrics |= run.rollout_metrics(rollouts, correct, step)
    metrics |= {
        "rollout_seconds": generated - began,
        "sync_seconds": synchronized - trained,
        "tokens_per_second": metrics["response_tokens"] / (synchronized - began),
        "seconds": run.seconds(),
    }
    interval = run.config.reporting.rollouts_interval
    if interval and step % interval == 0:
        _record_rollouts(run, step, rollouts, correct, result)
    if run.writer is not None:
        run.writer.write(metrics)
    return metrics


def save(run: Run) -> None:
    """A checkpoint of everything that the next step depends on. Collective."""
    run.state.seconds, run.started = run.seconds(), time.perf_counter()
    run.state.probe_tokens = run.probe
    run.state.probe_log_probs = trained_log_probs(run)[0].tolist()
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
    """rollouts/step-N.jsonl by the first rank; zones come from the ranks that saw the tokens."""
    mine: dict[int, str] = {}
    if run.parallel.tp_rank == 0:
        letters = "".join("ABC-"[zone] for zone in result.zones.tolist())  # -1, not valid, is the last
        for index, letter in zip(result.rollout_index.tolist(), letters, strict=True):
            mine[index] = mine.get(index, "") + letter
    parts: list[dict[int, str]] | None = [{}] * run.parallel.world_size if run.parallel.rank == 0 else None
    dist.gather_object(mine, parts, dst=0, group=run.parallel.control)
    if parts is None:
        return
    zones = {index: text for part in parts for index, text in part.items()}
    extras = [
        {"response": run.tokenizer.decode(rollout.response_token_ids), "correct": right, "zones": zones[index]}
        for index, (rollout, right) in enumerate(zip(rollouts, correct, strict=True))
    ]
    write_records(record_path(run.config.output, step), rollouts, extras)
