"""Collectives that have begun and have not been waited for: what they still read may not be written, what they write
may not be touched. On a GPU either is a race, which goes well most of the time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_sead.tracing.errors import WrongCollective


class Span(NamedTuple):
    """Bytes of a storage that a tensor may touch. The storage lives as long: as with NCCL, until it is waited for."""

    storage: torch.UntypedStorage
    first: int
    end: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Span:
        first, size = int(tensor.storage_offset()), tensor.element_size()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
        return Span(tensor.untyped_storage(), first * size, (first + last + 1) * size)

    def meets(self, other: Span) -> bool:
        same = self.storage._cdata == other.storage._cdata
        return same and self.first < other.end and other.first < self.end


class InFlight:
    """Of one rank."""

    def __init__(self) -> None:
        self.works: dict[int, Work] = {}  # by their ids: they live until they are waited for

    def begin(self, what: str, group: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor]) -> dist.Work:
        """The handle of a collective. `what`: its name and line."""
        work = Work(self, what, group, [Span.of(t) for t in reads], [Span.of(t) for t in writes])
        self.works[id(work)] = work
        return work

    def check(self, line: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor], group: str = "") -> None:
        """What runs now may touch these tensors; a collective of `group` comes after those of the same group.

        Raises:
            WrongCollective: it may not.
        """
        others = [work for work in self.works.values() if work.group != group]
        for tensors, writing in ((reads, False), (writes, True)):
            for span in map(Span.of, tensors) if others else ():
                for work in others:
                    work.check(line, span, writing)

    def require_none(self, where: str) -> None:
        """
        Raises:
            WrongCollective: something has not been waited for.
        """
        for work in self.works.values():
            raise WrongCollective(f"{work.what} has not been waited for when {where}")


class Work(dist.Work):
    """A handle, as torch's own."""

    def __init__(self, flights: InFlight, what: str, group: str, reads: list[Span], writes: list[Span]) -> None:
        super().__init__()
        self.what, self.group = what, group
        self._flights, self._reads, self._writes = flights, reads, writes

    def check(self, line: str, span: Span, writing: bool) -> None:
        if any(map(span.meets, self._writes)):
            raise WrongCollective(f"{line}: a tensor is used that {self.what} writes and that has not been waited for")
        if writing and any(map(span.meets, self._reads)):
            raise WrongCollective(
                f"{line}: a tensor is written that {self.what} reads and that has not been waited for"
            )

    def wait(self, timeout: Any = None) -> bool:
        """
        Raises:
            WrongCollective: memory of its tensors was freed before.
        """
        self._flights.works.pop(id(self), None)
        spans, self._reads, self._writes = [*self._reads, *self._writes], [], []
        for span in spans:
            if span.storage.nbytes() < span.end:
                raise WrongCollective(f"{self.what}: memory of its tensors was freed before it has been waited for")
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True
