"""Whole runs of the tiny pair on real ranks, for tests: the loop itself, without the command around it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch.distributed as dist

from megatron_sead.config.run import load_config
from tests.distributed.ranks import RankPool

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


class Pools:
    """Pools of 1, 2 and 4 ranks, started when first needed and used again: importing Megatron takes seconds."""

    def __init__(self, timeout: float = 240.0) -> None:
        self.timeout = timeout
        self._pools: dict[int, RankPool] = {}

    def of(self, ranks: int) -> RankPool:
        """The pool of so many ranks."""
        if ranks not in self._pools:
            self._pools[ranks] = RankPool(ranks, self.timeout)
        return self._pools[ranks]

    def train(self, ranks: int, output: Path, overrides: list[str], interrupt_at: int | None = None) -> list[Any]:
        """Run the loop with `SHORT` and the overrides; what `run` returned on each rank."""
        meeting_point = Path(mkdtemp()) / "store"
        return self.of(ranks).run(
            _train, ranks, str(meeting_point), [*SHORT, f"output={output}", *overrides], interrupt_at
        )

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


def _train(ranks: int, meeting_point: str, overrides: list[str], interrupt_at: int | None) -> bool:
    from megatron_sead.parallel.groups import destroy_parallel
    from megatron_sead.training import loop

    destroy_parallel()  # a run that failed leaves its groups
    import os

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=ranks)
    with _signal_at(interrupt_at if rank == ranks - 1 else None):
        return loop.run(load_config(TINY, overrides))


@contextmanager
def _signal_at(step: int | None) -> Iterator[None]:
    """Raise SIGINT in this process when it enters a step, as Ctrl-C would."""
    from megatron_sead.training import loop

    train_step = loop.train_step

    def interrupted(*args: Any) -> Any:
        if args[-1] == step:
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    loop.train_step = interrupted
    try:
        yield
    finally:
        loop.train_step = train_step


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k} for line in lines]


def zones_of(output: Path, step: int) -> list[str]:
    """Each rollout's zones as the record has them, "ABBC..."."""
    text = (output / "rollouts" / f"step-{step}.jsonl").read_text()
    return [json.loads(line)["zones"] for line in text.splitlines()]
