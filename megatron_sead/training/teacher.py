"""The co-located teacher: a frozen model in the student's process groups, with its own forward-only pass.

No DDP, no optimizer, no gradient buffers. What it leaves for the loss are final hidden states, not logits: ten
kilobytes a token at hidden size 5120 against two hundred over 100k tokens, and its head recomputes the logits exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import cycle, islice
from types import TracebackType

import torch

from megatron_sead.models.decoder import Decoder
from megatron_sead.models.slabs import aligned, slabs
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.pipeline import run_schedule

# Shapes: n response tokens of a micro-batch, h hidden size

KeepRows = Callable[[MicroBatch, torch.Tensor], torch.Tensor]


class Teacher:
    """This rank's frozen chunks.

    Args:
        offload: keep the weights in host memory, but for the head, which the loss uses, and on the device only while
            a pass runs. On a CPU the two are one memory and nothing moves.
    """

    def __init__(self, chunks: list[Decoder], *, offload: bool) -> None:
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        self.chunks = chunks
        head = chunks[-1].head_weight
        self.head = None if head is None else head.detach()
        self._offloaded = _OffloadedWeights(chunks, head) if offload else None

    def hidden_states(
        self, micro_batches: list[MicroBatch], parallel: ParallelContext, keep: KeepRows | None = None
    ) -> list[torch.Tensor]:
        """Final hidden states [n, h] at the response positions, a micro-batch each, in host memory.

        Pinned when they come from a GPU. Empty before the last pipeline stage. Collective.

        Args:
            keep: returns the rows to keep, of a micro-batch and its [n, h]; None: all of them.
        """

        def to_host(index: int, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden if keep is None else keep(passed[index], hidden)
            if not hidden.is_cuda:
                return hidden.detach()
            host = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=True)
            return host.copy_(hidden, non_blocking=True)

        layout = parallel.for_teacher()
        passed = micro_batches
        if layout.vpp_size is not None:  # virtual stages want whole groups of micro-batches
            passed = list(islice(cycle(micro_batches), -(-len(micro_batches) // layout.pp_size) * layout.pp_size))
        with self._offloaded or nullcontext():
            states = run_schedule(list(self.chunks), passed, "teacher", to_host, parallel=layout, forward_only=True)
        if parallel.device.type == "cuda":  # the host may read the states: they have arrived
            torch.cuda.current_stream().synchronize()
        return states[: len(micro_batches)]


class _OffloadedWeights:
    """Frozen parameters that are kept in host memory; inside ``with`` they are on their device.

    Since they are frozen, leaving copies nothing back: the device's copy is freed, and the host's is still the same.
    They lie in few `slabs` of memory.
    """

    def __init__(self, chunks: list[Decoder], stays: torch.Tensor | None) -> None:
        parameters = [p for chunk in chunks for p in chunk.parameters() if p is not stays]
        numbers = slabs([p.nbytes for p in parameters])
        self._slabs = [_Slab([parameters[i] for i in slab]) for slab in numbers]

    def __enter__(self) -> None:
        for slab in self._slabs:
            slab.onto_device()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slab in self._slabs:
            slab.off_device()


class _Slab:
    """One piece of host memory, and the parameters that are views of it, or of its copy."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters, self._device = parameters, parameters[0].device
        size = sum(aligned(parameter.nbytes) for parameter in parameters)
        self._host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._device.type == "cuda")
        for parameter, place in self._places():
            view = self._host[place].view(parameter.dtype).view(parameter.shape)
            parameter.data = view.copy_(parameter.data)

    def onto_device(self) -> None:
        self._point_to(self._host.to(self._device, non_blocking=True))

    def off_device(self) -> None:
        self._point_to(self._host)

    def _point_to(self, memory: torch.Tensor) -> None:
        for parameter, place in self._places():
            parameter.data = memory[place].view(parameter.dtype).view(parameter.shape)

    def _places(self) -> Iterator[tuple[torch.nn.Parameter, slice]]:
        start = 0
        for parameter in self._parameters:
            yield parameter, slice(start, start + parameter.nbytes)
            start += aligned(parameter.nbytes)
