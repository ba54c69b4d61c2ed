"""One rank of a run that a study measures: the training loop as it is, without checkpoints and export.

Each rank leaves ``ranks/rank-N.json`` in the run
directory: what the steps' micro-batches held, and what the last step, which is watched, sent and held in memory.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from megatron_sead.config.run import RunConfig
from megatron_sead.files.durable import replace_text
from megatron_sead.launch.rank_failures import ending_together
from megatron_sead.reporting.machine import peak_resident

FOLDER = "ranks"


def measure(config: RunConfig) -> None:
    """Train as this rank, and write down what was seen. Collective."""
    if config.device == "cpu":
        from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

        adapt_to_cpu()
    import torch

    from megatron_sead.training.loop import distill
    from megatron_sead.training.setup import prepare

    before = resident()
    with ending_together(), prepare(config) as run, ExitStack() as stack:
        seen = Seen(run, stack, config.training.steps - 1)
        if config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the copies of a model being loaded are not a step's
        run.checkpoint_due = lambda step: False  # type: ignore[method-assign]
        if not distill(run):
            sys.exit(1)  # a signal ended it: not measured
        stack.close()
        told = seen.told() | {"rank": run.parallel.rank, "world_size": run.parallel.world_size}
        told |= {"resident_before": before, "resident_peak": resident(peak=True)}
        if config.device == "cuda":
            told["allocated_peak"] = torch.cuda.max_memory_allocated()
            told["reserved_peak"] = torch.cuda.max_memory_reserved()
            told["gpu"] = torch.cuda.get_device_name()
        path = config.output / FOLDER / f"rank-{run.parallel.rank:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(told) + "\n")
        torch.distributed.barrier(run.parallel.control)


def resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory, now or at the most."""
    if peak:
        return peak_resident()
    import psutil

    return int(psutil.Process().memory_info().rss)


class Seen:
    """What a rank saw of its steps.

    Args:
        run: whose methods are listened to.
        stack: ends the watching.
        watched: the step whose collectives and memory are looked at.
    """

    def __init__(self, run: Any, stack: ExitStack, watched: int) -> None:
        from megatron_sead.scaling.watching import StepWatch

        self.micro_batches: list[int] = []  # a step each
        self.padded_tokens: list[int] = []  # of all its micro-batches, as the student sees them
        self._clock: list[float] = []  # this process's processor time at the beginning of each step
        self.watch = StepWatch(run.parallel)
        pack, next_batch = run.pack, run.curriculum.next_batch

        def note(rollouts: Any, **options: Any) -> Any:
            batches = pack(rollouts, **options)
            if options.get("shared", True):
                self.micro_batches.append(len(batches))
                self.padded_tokens.append(sum(batch.student.tokens.numel() for batch in batches))
            return batches

        def begin(step: int) -> Any:
            self._clock.append(time.process_time())
            if step == watched:
                stack.enter_context(self.watch.entered())
            return next_batch(step)

        run.pack, run.curriculum.next_batch = note, begin

    def told(self) -> dict[str, Any]:
        """For the rank's file. Processor seconds are of all steps but the watched one."""
        seconds = [after - before for before, after in pairwise(self._clock)]
        steps = {"micro_batches": self.micro_batches, "padded_tokens": self.padded_tokens, "cpu_seconds": seconds}
        return steps | self.watch.told()
