"""The processes that measure together: torchrun's ranks, or this one alone. No Megatron."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_sead.checkpoints.manifest import from_first_rank
from megatron_sead.errors import UserError
from megatron_sead.parallel.joining import join_world, local_gpu

ResultT = TypeVar("ResultT")
PATIENCE = timedelta(days=7)  # ranks wait for the one that writes longest; one that has failed ends the others


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that share the prompts."""

    device: torch.device
    group: dist.ProcessGroup  # gloo, whatever the device
    rank: int
    size: int

    def on_first(self, action: Callable[[], ResultT]) -> ResultT:
        """What `action` returns on the first rank, or the UserError that it raises there, on every rank. Collective."""
        outcome: ResultT | UserError | None = None
        if self.rank == 0:
            try:
                outcome = action()
            except UserError as error:
                outcome = error
        outcome = from_first_rank(outcome, self.group)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The process group of the ranks that torchrun started, taken down at the end.

    After an error that of several ranks stays: peers may wait in a collective, and whoever catches it ends the process.

    Args:
        device: "cuda" or "cpu".

    Raises:
        UserError: a device that is not there, or variables of torchrun that are missing.
    """
    chosen = local_gpu() if device == "cuda" else torch.device("cpu")
    join_world(device, PATIENCE)
    alone = dist.get_world_size() == 1
    try:
        yield Ranks(chosen, dist.new_group(backend="gloo", timeout=PATIENCE), dist.get_rank(), dist.get_world_size())
    except BaseException:
        if alone:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
