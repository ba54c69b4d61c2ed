"""Policies that fail on the last rank, when it is asked for weights: the other ranks wait for it in a collective."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from megatron_sead.distillation import PolicyInput, TokenWeights
from megatron_sead.errors import UserError


def mistaken(step: PolicyInput) -> TokenWeights:
    """Raises what a user's mistake raises."""
    if _is_last():
        raise UserError("forced on the last rank")
    return _nothing(step)


def killed(step: PolicyInput) -> TokenWeights:
    """Is killed, as the system does for want of memory."""
    if _is_last():
        os.kill(os.getpid(), signal.SIGKILL)
    return _nothing(step)


def _is_last() -> bool:
    if dist.get_rank() != dist.get_world_size() - 1:
        return False
    Path(os.environ["FAILURE_MARKER"]).write_text(str(time.time()))
    return True


def _nothing(step: PolicyInput) -> TokenWeights:
    weight = step.valid.float()
    return TokenWeights(weight, weight)
