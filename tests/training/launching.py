"""Whole runs of the tiny pair on real ranks, for tests: the loop itself, without the command around it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sead.config.run import load_config
from tests.distributed.ranks import RankPools

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "configs" / "sead_tiny.yaml"

# Steps short enough for a test, everything else as in the quickstart
SHORT = [
    "training.lr_warmup_steps=2",
    "training.global_batch_size=32",
    "training.micro_batch_size=8",
    "parallel.tensor_model_parallel_size=1",
    "evaluation.path=null",
    "checkpoints.interval=0",
    "reporting.tensorboard=false",
    *(f"{role}.path={ROOT / 'examples' / 'tiny' / role}" for role in ("student", "teacher")),
    f"prompts.path={ROOT / 'examples' / 'tiny' / 'prompts.jsonl'}",
]


def train_tiny(
    pools: RankPools, ranks: int, output: Path, overrides: list[str], interrupt_at: int | None = None
) -> list[Any]:
    """Run the loop with `SHORT` and the overrides; what `run` returned on each rank."""
    return pools.of(ranks).run(_train, [*SHORT, f"output={output}", *overrides], interrupt_at)


def _train(overrides: list[str], interrupt_at: int | None) -> bool:
    from megatron_sead.training import loop

    with _signal_at(interrupt_at if dist.get_rank() == dist.get_world_size() - 1 else None):
        return loop.run(load_config(TINY, overrides))


@contextmanager
def _signal_at(step: int | None) -> Iterator[None]:
    """Raise SIGINT in this process when it enters a step, as Ctrl-C would."""
    from megatron_sead.training import loop

    train_step = loop.train_step

    def interrupted(learner: Any, micro_batches: Any, alpha: float, at: int, *rest: Any) -> Any:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return train_step(learner, micro_batches, alpha, at, *rest)

    loop.train_step = interrupted
    try:
        yield
    finally:
        loop.train_step = train_step


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what the machine decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "per_second", "memory")
    return [{k: v for k, v in line.items() if not any(word in k for word in measured)} for line in lines]


def zones_of(output: Path, step: int) -> list[str]:
    """Each rollout's zones as the record has them, "ABBC..."."""
    text = (output / "rollouts" / f"step-{step}.jsonl").read_text()
    return [json.loads(line)["zones"] for line in text.splitlines()]
