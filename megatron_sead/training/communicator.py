"""Pipeline messages between two stages that are each other's previous and next: virtual stages on two ranks.

Megatron-Core first sends the shapes of a micro-batch's tensors, since lengths vary, then the tensors. At pipeline
size 2 with virtual stages both directions go to one peer. For tensors ``batch_p2p_comm=False`` keeps the directions
apart; shapes are always sent in one batch, where a rank's "to previous" meets the other's "from previous", and a
stage receives the shape of another micro-batch. Both released versions, 0.16.1 and 0.19.2, do so.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops

from megatron_sead.models import ParallelContext, unwrap


def schedule_arguments(chunk: torch.nn.Module, parallel: ParallelContext) -> dict[str, Any]:
    """Keyword arguments that Megatron's schedule needs beyond its defaults, for one of this rank's model chunks."""
    if parallel.pp_size != 2 or parallel.vpp_size is None:
        return {}
    communicator = TwoStageCommunicator(pp_group=parallel.pp, config=unwrap(chunk).config)
    return {"p2p_communicator": communicator, "pg_collection": parallel.megatron}


class TwoStageCommunicator(P2PCommunicator):
    """Sends shapes as Megatron sends tensors when it does not batch them: each direction in a group of its own."""

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        device = torch.cuda.current_device()

        def shape_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64, device=device)

        to_prev, to_next = shape_of(tensor_send_prev), shape_of(tensor_send_next)  # alive until they are sent
        from_prev, from_next = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
        requests = _p2p_ops(
            tensor_send_prev=to_prev,
            tensor_recv_prev=from_prev if recv_prev else None,
            tensor_send_next=to_next,
            tensor_recv_next=from_next if recv_next else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return from_prev.tolist(), from_next.tolist()
