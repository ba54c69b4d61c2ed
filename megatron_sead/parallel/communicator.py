"""Pipeline messages between virtual stages, where micro-batches differ in length.

Megatron-Core exchanges the shapes of a call's tensors and waits, then exchanges the tensors. With virtual stages,
0.16.1 and 0.19.2 fail twice:

- A stage that sends one way and receives the other waits for the peer's shape before it sends its own tensor, which
  the peer may need first: with as many micro-batches as pipeline stages, all wait for ever.
- At pipeline size 2 the previous and the next stage are one peer. Shapes are always sent in one batch, where a rank's
  "to previous" meets the other's "from previous", and a stage receives the shape of another micro-batch
  (``batch_p2p_comm=False`` keeps tensors apart, not shapes).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megatron_sead.parallel.context import ParallelContext


def schedule_arguments(chunk: torch.nn.Module, parallel: ParallelContext) -> dict[str, Any]:
    """Keyword arguments that Megatron's schedule needs beyond its defaults, for one of this rank's model chunks."""
    if parallel.vpp_size is None:
        return {}
    communicator = VirtualStageCommunicator(pp_group=parallel.pp, config=get_model_config(chunk))
    return {"p2p_communicator": communicator, "pg_collection": parallel.megatron}


class VirtualStageCommunicator(P2PCommunicator):
    """Sends a shape and its tensor together, without waiting, before it receives anything.

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
                shape = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
                sent += [(part, dist.isend(part, peer, group=group)) for part in (shape, tensor)]
        received_prev = self._receive(self.prev_rank, from_prev) if recv_prev else None
        received_next = self._receive(self.next_rank, from_next) if recv_next else None
        for _, request in sent:
            request.wait()
        return received_prev, received_next, None

    def _receive(self, peer: int | None, group: dist.ProcessGroup) -> torch.Tensor:
        device = torch.cuda.current_device()
        shape = torch.empty(3, dtype=torch.int64, device=device)
        dist.recv(shape, peer, group=group)
        tensor = torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
        dist.recv(tensor.detach(), peer, group=group)
        return tensor
