"""Pipeline messages, where micro-batches differ in length.

Megatron-Core exchanges the shapes of a call's tensors and waits for them, then exchanges the tensors. On a GPU the host
reads the device for every message; and with virtual stages 0.16.1 and 0.19.2 fail twice:

- A stage that sends one way and receives the other waits for the peer's shape before it sends its own tensor, which
  the peer may need first: with as many micro-batches as pipeline stages, all wait for ever.
- At pipeline size 2 the previous and the next stage are one peer. Shapes are always sent in one batch, where a rank's
  "to previous" meets the other's "from previous", and a stage receives the shape of another micro-batch
  (``batch_p2p_comm=False`` keeps tensors apart, not shapes).

All stages know all micro-batches, and in which order they come: so here no shape is sent at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megatron_sead.parallel.context import ParallelContext

# Shapes: b sequences of a micro-batch, s padded length, h hidden size, tp ranks that share a sequence

Shape = tuple[int, int, int]


def schedule_arguments(
    chunk: torch.nn.Module, parallel: ParallelContext, token_shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Keyword arguments that Megatron's schedule needs beyond its defaults.

    Args:
        chunk: one of this rank's model chunks.
        token_shapes: (b, s) of each micro-batch, in the order in which they go through.
    """
    if parallel.pp_size == 1:
        return {}
    config: Any = get_model_config(chunk)
    shards = parallel.tp_size if config.sequence_parallel else 1
    shapes = [(s // shards, b, config.hidden_size) for b, s in token_shapes]
    kind = StageCommunicator if parallel.vpp_size is None else VirtualStageCommunicator
    return {"p2p_communicator": kind(parallel, config, shapes), "pg_collection": parallel.megatron}


def received_shapes(shapes: Sequence[Shape], stages: int, chunks: int) -> Iterator[Shape]:
    """Shapes in the order in which a rank receives them one way, forward or backward.

    Megatron sends `stages` micro-batches through a chunk, then the same ones through the next chunk, and so on.

    Args:
        shapes: of the micro-batches.
        chunks: how many of the rank's chunks have a neighbour on that side.
    """
    for start in range(0, len(shapes), stages):
        for _ in range(chunks):
            yield from shapes[start : start + stages]


class StageCommunicator(P2PCommunicator):
    """Megatron's, but for the exchange of shapes: of one schedule, whose micro-batches have these shapes."""

    def __init__(self, parallel: ParallelContext, config: Any, shapes: Sequence[Shape]) -> None:
        super().__init__(pp_group=parallel.pp, config=config)
        before, behind = parallel.chunks - parallel.is_first_stage, parallel.chunks - parallel.is_last_stage
        self._from_prev = received_shapes(shapes, parallel.pp_size, before)
        self._from_next = received_shapes(shapes, parallel.pp_size, behind)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        return next(self._from_prev) if recv_prev else None, next(self._from_next) if recv_next else None


class VirtualStageCommunicator(StageCommunicator):
    """Sends without waiting, before it receives anything.

    What two ranks say to each other goes through two groups, one each way: so neither's send, on a GPU, waits in a
    queue behind the other's. With two stages a rank sends to one peer as next and as previous, in that order.
    """

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Tensors from the previous and from the next stage, each None where not asked for."""
        world = dist.group.WORLD
        assert world is not None
        to_next, to_prev, from_prev, from_next = self.pp_group, world, self.pp_group, world
        if self.pp_group.size() == 2:
            first = self.pp_group.rank() == 0
            to_next = to_prev = self.pp_group if first else world
            from_prev = from_next = world if first else self.pp_group
        sent: list[tuple[torch.Tensor, Any]] = []  # tensors stay alive until they have gone
        sends = ((tensor_send_next, self.next_rank, to_next), (tensor_send_prev, self.prev_rank, to_prev))
        for tensor, peer, group in sends:
            if tensor is not None:
                sent.append((tensor, dist.isend(tensor, peer, group=group)))
        shape_prev, shape_next = self._communicate_shapes(None, None, recv_prev, recv_next)
        received_prev = self._receive(shape_prev, self.prev_rank, from_prev)
        received_next = self._receive(shape_next, self.next_rank, from_next)
        for _, request in sent:
            request.wait()
        return received_prev, received_next, None

    def _receive(self, shape: Shape | None, peer: int | None, group: dist.ProcessGroup) -> torch.Tensor | None:
        if shape is None:
            return None
        device = torch.cuda.current_device()
        tensor = torch.empty(shape, dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
        dist.recv(tensor.detach(), peer, group=group)
        return tensor
