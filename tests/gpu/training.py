"""Check 8: whole training steps of six layers of the 7B's widths: memory by phase beside the plan, rates, kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.gpu.check import CUDA, DEVICE, Report
from tests.gpu.models import ROOT, micro_batches, random_model, start_parallel, vocabulary, write_shape

LAYERS = 6 if CUDA else 2
PROMPT, RESPONSE = (1024, 7168) if CUDA else (8, 24)
MICRO_BATCHES = 2
SCRATCH = 2**30 if CUDA else 2**20
PEAK_FLOPS = 989e12  # bf16 of an H100 SXM, dense


def training_recompute_full(report: Report) -> None:
    _train(report, "full")


def training_recompute_none(report: Report) -> None:
    _train(report, None)


def _train(report: Report, recompute: str | None) -> None:
    parallel = start_parallel()
    folder = write_shape(LAYERS)
    config = _config(folder, recompute)
    learner = _learner(config, folder, parallel)
    batches = micro_batches(MICRO_BATCHES, PROMPT, RESPONSE, vocabulary(folder))
    plan = _plan(config)
    report.add(plan_gib={name: value / 2**30 for name, value in plan.items()}, resident_gib=_gib(_allocated()))
    phases = Phases()
    phases.watch(learner)
    from megatron_sead.training.step import train_step

    for step in range(2):
        phases.seen.clear()
        started = time.perf_counter()
        metrics = train_step(learner, batches, 0.4, step).metrics
        phases.synchronize()
        seconds = time.perf_counter() - started
        report.add(
            **{f"step {step} seconds": seconds, f"step {step}": metrics_of(metrics), f"phases {step}": phases.seen}
        )
        report.expect(f"step {step}", bool(metrics.get("loss")) and metrics["grad_norm"] > 0, "finite, and it trains")
    _rates(report, phases, seconds)
    if CUDA:
        highest = max(phase["peak_gib"] for phase in phases.seen.values())
        planned = max(plan.values()) / 2**30
        report.add(peak_gib=highest, planned_gib=planned, peak_of_plan=highest / planned)
        report.expect("peak", abs(highest / planned - 1) <= 0.1, "within 10 % of the plan")
        report.attempt("profile", lambda: _profile(report, lambda: train_step(learner, batches, 0.4, 2), recompute))


def metrics_of(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("loss", "grad_norm", "active_tokens") if name in metrics}


def _config(folder: Path, recompute: str | None) -> Any:
    from megatron_sead.config import load_config

    overrides = [f"{role}.path={folder}" for role in ("student", "teacher")]
    overrides += ["teacher.offload=true", f"device={DEVICE.type}", "parallel.tensor_model_parallel_size=1"]
    overrides += [
        "training.precision=bf16",
        "training.steps=100",
        "training.lr=1e-6",
        "training.min_lr=0",
        "training.micro_batch_size=1",
    ]
    overrides += [f"training.global_batch_size={MICRO_BATCHES}", f"training.scratch_bytes={SCRATCH}"]
    overrides += [f"rollouts.max_new_tokens={RESPONSE}", f"prompts.max_prompt_tokens={PROMPT}"]
    overrides += [f"training.recompute_granularity={recompute or 'null'}", "evaluation.path=null"]
    return load_config(ROOT / "examples" / "configs" / "sead_tiny.yaml", overrides)


def _learner(config: Any, folder: Path, parallel: Any) -> Any:
    """As `setup` makes it, but with random weights, which no file holds."""
    from megatron_sead.training.optimizer import build_optimizer
    from megatron_sead.training.scoring import Heads
    from megatron_sead.training.step import Learner
    from megatron_sead.training.supervision import Supervisor
    from megatron_sead.training.teacher import Teacher

    frozen = Teacher([random_model(folder, parallel)], offload=True)
    student = random_model(folder, parallel, recompute_granularity=config.training.recompute_granularity)
    ddp_chunks, optimizer, scheduler = build_optimizer([student], config.training, parallel)
    heads = Heads(
        student=student.head_weight,
        teacher=frozen.head,
        student_stop_token_ids=(1,),
        teacher_stop_token_ids=(1,),
        vocab_size=vocabulary(folder),
        scratch_bytes=config.training.scratch_bytes,
        group=None,
        sequence_parallel=False,
    )
    return Learner(ddp_chunks, frozen, optimizer, scheduler, heads, Supervisor(config, None), parallel)


def _plan(config: Any) -> dict[str, int]:
    from megatron_sead.planning.plan import make_plan

    (stage,) = make_plan(config, 1).stages
    return {phase: size for phase, size in stage.phases.items() if phase != "rollouts"}


class Phases:
    """Seconds and peak memory of what a step calls, by name; the rest of a step belongs to none."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, float]] = {}

    def watch(self, learner: Any) -> None:
        from megatron_sead.training import step

        learner.teacher.hidden_states = self._timed("teacher", learner.teacher.hidden_states)
        step.score_student = self._timed("scores", step.score_student)  # type: ignore[assignment]
        step.run_schedule = self._timed("forward, loss, backward", step.run_schedule)  # type: ignore[assignment]
        step.apply_gradients = self._timed("optimizer", step.apply_gradients)  # type: ignore[assignment]

    def synchronize(self) -> None:
        if CUDA:
            torch.cuda.synchronize()

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self.synchronize()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            result = work(*arguments, **options)
            self.synchronize()
            peak = torch.cuda.max_memory_allocated() if CUDA else 0
            self.seen[name] = {"seconds": time.perf_counter() - started, "peak_gib": _gib(peak)}
            return result

        return timed


def _rates(report: Report, phases: Phases, seconds: float) -> None:
    """Model operations of forward and backward, recomputed ones not counted, of a card's peak."""
    tokens = MICRO_BATCHES * (PROMPT + RESPONSE)
    length, hidden, ffn, window = PROMPT + RESPONSE, 4096, 11008, 4096
    layer = 2 * (4 * hidden**2 + 3 * hidden * ffn)
    seen = [min(length, window) if number % 4 != 3 else length for number in range(LAYERS)]
    attention = sum(4 * hidden * (keys - keys**2 / (2 * length) if keys < length else length / 2) for keys in seen)
    forward = tokens * (LAYERS * layer + attention)
    taken = phases.seen["forward, loss, backward"]["seconds"]
    report.add(tokens_per_second=tokens / seconds, model_tflop_forward=forward / 1e12)
    if CUDA:
        report.add(mfu_with_loss=3 * forward / taken / PEAK_FLOPS)


def _profile(report: Report, work: Callable[[], Any], recompute: str | None) -> None:
    """The third step's kernels, by the time that they take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    text = events.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    (report.folder / f"kernels_recompute_{recompute or 'none'}.txt").write_text(text, encoding="utf-8")
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)[:15]
    report.add(top_kernels={event.key[:80]: event.self_device_time_total / 1000 for event in kernels})


def _allocated() -> int:
    return torch.cuda.memory_allocated() if CUDA else 0


def _gib(size: float) -> float:
    return size / 2**30
