"""Live and highest bytes by phase, and who holds them at the highest."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch

from megatron_sead.tracing.shadows import is_cuda

DEVICE, HOST, PINNED = "device", "host", "pinned"
GRAIN = 512  # bytes, to which CUDA's caching allocator rounds


@dataclass
class PhaseMemory:
    """Bytes by place."""

    peak: Counter[str] = field(default_factory=Counter)
    holders: dict[str, Counter[str]] = field(default_factory=dict)  # at the peak; by line of code


class Memory:
    """Follows storages from the operation that makes them to their end."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.phases: dict[str, PhaseMemory] = {}
        self._phase = PhaseMemory()
        self._held: dict[str, Counter[str]] = {DEVICE: Counter(), HOST: Counter(), PINNED: Counter()}
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str, str]] = {}
        self._above = set[str]()  # places whose peak is newer than its list of holders

    def begin(self) -> dict[str, PhaseMemory]:
        """Phases from here on; filled as they come."""
        self.phases = {}
        return self.phases

    def enter(self, phase: str) -> None:
        """From here on peaks are of `phase`."""
        self._note_holders()
        self._phase = self.phases.setdefault(phase, PhaseMemory())
        for place in self.live:
            self._raise_peak(place)

    def made(self, tensor: torch.Tensor, by: str, *, pinned: bool = False) -> None:
        """A tensor is there whose memory may be new. `by`: the line that made it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        place = DEVICE if is_cuda(tensor) else PINNED if pinned else HOST
        size = rounded(storage.nbytes(), place)
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), size, place, by
        self.live[place] += size
        self._held[place][by] += size
        self._raise_peak(place)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Is its memory that of an earlier tensor?"""
        return tensor.untyped_storage()._cdata in self._known

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known is not None and known[2] == PINNED

    def _gone(self, key: int) -> None:
        self._note_holders()
        _, size, place, by = self._known.pop(key)
        self.live[place] -= size
        self._held[place][by] -= size

    def _raise_peak(self, place: str) -> None:
        if self.live[place] > self._phase.peak[place]:
            self._phase.peak[place] = self.live[place]
            self._above.add(place)

    def _note_holders(self) -> None:
        for place in self._above:
            self._phase.holders[place] = +self._held[place]
        self._above.clear()


def rounded(size: int, place: str) -> int:
    """What an allocator takes for so many bytes."""
    if place == PINNED:  # torch's allocator of pinned memory
        return 1 << (size - 1).bit_length() if size else 0
    return -(-size // GRAIN) * GRAIN if place == DEVICE else size
