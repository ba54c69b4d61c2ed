"""From ranks that torchrun started, or one process alone, to the default process group. Knows nothing of Megatron."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_sead.config.environment import check_rank_variables, environment_number
from megatron_sead.errors import UserError
from megatron_sead.wording import counted


def local_gpu() -> torch.device:
    """The GPU of this rank, which becomes the current one.

    Raises:
        UserError: no GPU is visible, or too few for the ranks of this node.
    """
    if not torch.cuda.is_available():
        raise UserError("device: cuda, but no GPU is visible; use device=cpu, or start on a machine with GPUs")
    local, visible = environment_number("LOCAL_RANK", 0, least=0) or 0, torch.cuda.device_count()
    if local >= visible:
        raise UserError(
            f"device: cuda, but local rank {local} sees {counted(visible, 'GPU')}; "
            "start fewer ranks a node, or with LOCAL_RANK=0 where each rank sees a GPU of its own"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join_world(device: str, timeout: timedelta) -> None:
    """Make the default process group: NCCL between GPUs, gloo between processes. Collective over all ranks.

    Args:
        timeout: of a collective.

    Raises:
        UserError: RANK is set, and another variable that torchrun sets is not.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        check_rank_variables()
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
