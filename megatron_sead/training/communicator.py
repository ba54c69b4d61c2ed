"""Pipeline messages between two stages that are each other's previous and next: virtual stages on two ranks.

Where micro-batches differ in length, Megatron-Core exchanges the shapes of a call's tensors and waits, then exchanges
the tensors. At pipeline size 2 with virtual stages both directions go to one peer, and 0.16.1 and 0.19.2 fail twice:

- shapes are always sent in one batch, where a rank's "to previous" meets the other's "from previous", and a stage
  receives the shape of another micro-batch (``batch_p2p_comm=False`` keeps tensors apart, not shapes);
- a stage that sends one way and receives the other waits for the peer's shape before it sends its own tensor, which
  the peer may need first: with as many micro-batches as stages, all wait for ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_sead.models import ParallelContext, unwrap


def schedule_arguments(chunk: torch.nn.Module, parallel: ParallelContext) -> dict[str, Any]:
    """Keyword arguments that Megatron's schedule needs beyond its defaults, for one of this rank's model chunks."""
    if parallel.pp_size != 2 or parallel.vpp_size is None:
        return {}
    communicator = TwoStageCommunicator(pp_group=parallel.pp, config=unwrap(chunk).config)
    return {"p2p_communicator": communicator, "pg_collection": parallel.megatron}


class TwoStageCommunicator(P2PCommunicator):
    """Sends a shape and its tensor together, without waiting, and each rank's messages in a group of their own.

    Messages of a group arrive in the order in which they were sent: to the next stage, then to the previous one.
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
        outward, inward = (self.pp_group, world) if self.pp_group.rank() == 0 else (world, self.pp_group)
        sent: list[tuple[torch.Tensor, Any]] = []  # tensors stay alive until they have gone
        for tensor in (tensor_send_next, tensor_send_prev):
            if tensor is not None:
                shape = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
                sent += [(part, dist.isend(part, self.next_rank, group=outward)) for part in (shape, tensor)]
        from_prev = self._receive(inward) if recv_prev else None
        from_next = self._receive(inward) if recv_next else None
        for _, request in sent:
            request.wait()
        return from_prev, from_next, None

    def _receive(self, group: dist.ProcessGroup) -> torch.Tensor:
        device = torch.cuda.current_device()
        shape = torch.empty(3, dtype=torch.int64, device=device)
        dist.recv(shape, self.next_rank, group=group)
        tensor = torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
        dist.recv(tensor.detach(), self.next_rank, group=group)
        return tensor
