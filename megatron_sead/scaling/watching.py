"""A step of a real rank, seen operation by operation: what it sends, and the most that its tensors hold."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sead.parallel.context import ParallelContext
from megatron_sead.tracing.collectives import group_of, moved_by
from megatron_sead.tracing.memory import Memory
from megatron_sead.tracing.shadows import tensors_of


class StepWatch(TorchDispatchMode):
    """Counts collectives and their bytes by group, and follows the storages of tensors.

    Groups of one rank send nothing, and are left out. Bytes are of the whole that a collective moves: all ranks' parts
    of a gather, as a trace counts them.
    """

    def __init__(self, parallel: ParallelContext) -> None:
        super().__init__()
        self._memory = Memory()
        self._control = parallel.control.group_name
        own = {label: getattr(parallel, label) for label in ("cp", "dp", "pp", "tp")}
        groups = [("all", dist.group.WORLD), *own.items(), ("dp", parallel.dp_with_cp)]
        self._by_name = {group.group_name: label for label, group in groups[1:]}
        self._by_ranks = {tuple(dist.get_process_group_ranks(group)): label for label, group in groups}
        self._calls: Counter[tuple[str, str]] = Counter()  # by group and name
        self._bytes: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Watch the body."""
        self._memory.enter("step")
        for found in gc.get_objects():
            if isinstance(found, torch.Tensor) and type(found) in (torch.Tensor, torch.nn.Parameter):
                self._memory.made(found, "")
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d" and (group := group_of(args)).size() > 1:
            name = func._overloadpacket.__name__
            key = self._label(group), name
            self._calls[key] += 1
            self._bytes[key] += sum(t.numel() * t.element_size() for t in moved_by(name, group, args))
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self._memory.made(tensor, "")
        return result

    def _label(self, group: Any) -> str:
        """Megatron has several groups of the same ranks: they count as one. Those that are named after what they are
        for keep that name: without replicas, the ranks of the context are also those that share the optimizer."""
        if group.group_name == self._control:
            return "control"
        label = self._by_name.get(group.group_name)
        return label or self._by_ranks.get(tuple(dist.get_process_group_ranks(group)), "other")

    def told(self) -> dict[str, Any]:
        """For a rank's file."""
        return {
            "collectives": [
                {"group": group, "name": name, "calls": calls, "bytes": self._bytes[group, name]}
                for (group, name), calls in sorted(self._calls.items())
            ],
            "tensors_peak": dict(self._memory.phases["step"].peak),
        }
