"""From rollouts to micro-batches: token ids for each model, and which positions predict response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shapes: b rollouts in a micro-batch, s padded length, n response tokens of the micro-batch


@dataclass
class TokenView:
    """One model's view of a micro-batch. Teacher and student may see different prompts."""

    tokens: torch.Tensor  # [b, s] int64, right-padded; the causal mask keeps padding out of every response position
    predictors: torch.Tensor  # [n] int64 into the flattened [b * s]: the position whose logits predict response token i


@dataclass
class MicroBatch:
    """Rollouts that go through the models together. The n response tokens are in the same order everywhere."""

    student: TokenView
    teacher: TokenView
    targets: torch.Tensor  # [n] int64: the response tokens themselves
    rollout_index: torch.Tensor  # [n] int64: which rollout of the global step, whatever the layout
    position: torch.Tensor  # [n] int64: place of the token in its response, from 0
    valid: torch.Tensor  # [n] bool: False where the token must not teach (masked truncated rollouts)


def pack(
    prompts_student: list[tuple[int, ...]],
    prompts_teacher: list[tuple[int, ...]],
    responses: list[tuple[int, ...]],
    valid: list[bool],
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    length_multiple: int,
    pad_token_id: int,
    device: torch.device,
) -> list[MicroBatch]:
    """This rank's micro-batches of the global step. All arguments are the global step's, equal on every rank."""
    raise NotImplementedError
