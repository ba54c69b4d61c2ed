"""A short training run as a rank sees it: the project's model, optimizer, schedule and store, with a plain loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sead.config.run import TrainingSettings
from tests.models.parity import Batch, Layout, Measured, run_schedule

SEQUENCES, LENGTH = 4, 24  # a step's batch


@dataclass
class Trained:
    """What a rank saw."""

    state: dict[str, Any] | None = None  # from the checkpoint
    first_step: int = 0
    losses: list[float] = field(default_factory=list)  # on the last pipeline stage
    learning_rates: list[float] = field(default_factory=list)
    adam_steps: list[set[float]] = field(default_factory=list)  # after each step, over this rank's parameters
    draws: list[float] = field(default_factory=list)  # one of each generator, after each step
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)  # whole, after each step; on rank 0
    log: list[str] = field(default_factory=list)


def settings(precision: str, distributed: bool, **changes: Any) -> TrainingSettings:
    values = {
        "steps": 8,
        "global_batch_size": SEQUENCES,
        "precision": precision,
        "lr": 1e-3,
        "lr_warmup_steps": 2,
        "weight_decay": 0.1,
        "use_distributed_optimizer": distributed,
    }
    return TrainingSettings(**(values | changes))  # type: ignore[arg-type]


def train(
    hf_dir: Path,
    layout: Layout,
    directory: Path,
    *,
    precision: str = "fp32",
    distributed: bool = True,
    steps: int = 3,
    save_after: tuple[int, ...] = (),
    resume: bool = False,
    keep: int = 2,
) -> Trained:
    """Train up to step `steps`, saving after those in `save_after`.

    Args:
        resume: start from random weights and the newest checkpoint, so that nothing can come from elsewhere.
    """
    from megatron_sead.checkpoints.store import CheckpointStore
    from megatron_sead.models.builder import build_model
    from megatron_sead.models.huggingface import iterate_huggingface_weights
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_sead.training.optimizer import build_optimizer

    parallel = initialize_parallel(layout.settings(), "cpu", seed=1000 if resume else 0)
    chunks = build_model(hf_dir, parallel, precision=precision, load_weights=not resume)
    ddp_chunks, optimizer, scheduler = build_optimizer(chunks, settings(precision, distributed), parallel)
    store = CheckpointStore(directory, keep, parallel)
    trained = Trained()
    try:
        with _log_of("megatron_sead.checkpoints", trained.log):
            if resume:
                trained.state = store.load_latest(chunks, optimizer, scheduler)
                trained.first_step = trained.state["step"] if trained.state else 0
            for step in range(trained.first_step, steps):
                trained.learning_rates.append(optimizer.param_groups[0]["lr"])
                trained.losses += _step(ddp_chunks, optimizer, scheduler, parallel, step)
                trained.adam_steps.append(_adam_steps(optimizer))
                whole = {name: tensor.clone() for name, tensor in iterate_huggingface_weights(chunks, parallel)}
                trained.weights.append(whole if parallel.rank == 0 else {})
                trained.draws += _draw()
                if step + 1 in save_after:
                    store.save(step + 1, chunks, optimizer, scheduler, {"step": step + 1, "seen": [("a", 0.5)]}, {})
    finally:
        destroy_parallel(keep_world=True)
    return trained


def _step(ddp_chunks: list[Any], optimizer: Any, scheduler: Any, parallel: Any, step: int) -> list[float]:
    """Each token predicts the next one; the last of a sequence predicts nothing."""
    generator = torch.Generator().manual_seed(step)
    vocab_size = ddp_chunks[0].module.config.vocab_size
    tokens = list(torch.randint(0, vocab_size, (SEQUENCES, 1, LENGTH), generator=generator))
    mask = (torch.arange(LENGTH) < LENGTH - 1).long()[None]
    batch, measured = Batch(tokens, [ids.roll(-1, 1) for ids in tokens], [mask] * SEQUENCES), Measured()
    for chunk in ddp_chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    run_schedule(ddp_chunks, parallel, batch, measured)
    optimizer.step()
    scheduler.step(increment=1)
    total = torch.tensor(list(measured.losses.values()), dtype=torch.float64).sum()
    torch.distributed.all_reduce(total, group=parallel.dp)
    return [total.item() / SEQUENCES / (LENGTH - 1)] if parallel.is_last_stage else []


def _adam_steps(optimizer: Any) -> set[float]:
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return {float(state["step"]) for adam in inner for state in adam.state.values()}


def _draw() -> list[float]:
    import random

    import numpy
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        from_megatron = torch.rand(()).item()
    return [random.random(), numpy.random.random(), torch.rand(()).item(), from_megatron]


@contextmanager
def _log_of(name: str, lines: list[str]) -> Iterator[None]:
    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collect()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
