"""The co-located teacher: a frozen model in the student's process groups, with its own forward-only pass.

No DDP, no optimizer, no gradient buffers. What it leaves for the loss are final hidden states, not logits: ten
kilobytes a token at hidden size 5120 against two hundred over 100k tokens, and its head recomputes the logits exactly.
"""

from __future__ import annotations

from types import TracebackType

import torch

from megatron_sead.models.decoder import Decoder
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.pipeline import run_schedule

# Shapes: n response tokens of a micro-batch, h hidden size


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

    def hidden_states(self, micro_batches: list[MicroBatch], parallel: ParallelContext) -> list[torch.Tensor]:
        """Final hidden states [n, h] at the response positions, a micro-batch each, in host memory.

        Pinned when they come from a GPU. Empty before the last pipeline stage. Collective.
        """

        def to_host(index: int, hidden: torch.Tensor) -> torch.Tensor:
            if not hidden.is_cuda:
                return hidden.detach()
            host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            return host.copy_(hidden)

        chunks = list[torch.nn.Module](self.chunks)
        if self._offloaded is None:
            return run_schedule(chunks, micro_batches, "teacher", to_host, parallel=parallel, forward_only=True)
        with self._offloaded:
            return run_schedule(chunks, micro_batches, "teacher", to_host, parallel=parallel, forward_only=True)


class _OffloadedWeights:
    """Frozen parameters that are kept in host memory; inside ``with`` they are on their device.

    Since they are frozen, leaving copies nothing back: the device's copy is freed, and the host's is still the same.
    """

    def __init__(self, chunks: list[Decoder], stays: torch.Tensor | None) -> None:
        self._host_copies: list[tuple[torch.nn.Parameter, torch.device, torch.Tensor]] = []
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter is not stays:
                    host = parameter.data.cpu()
                    host = host.pin_memory() if parameter.is_cuda else host
                    self._host_copies.append((parameter, parameter.device, host))
        self._offload()

    def __enter__(self) -> None:
        for parameter, device, host in self._host_copies:
            parameter.data = host.to(device, non_blocking=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._offload()

    def _offload(self) -> None:
        for parameter, _, host in self._host_copies:
            parameter.data = host
