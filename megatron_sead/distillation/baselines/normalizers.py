"""The softmax's normalizer over a sharded vocabulary, in one collective.

A rank's columns give their maximum m_r and A_r = Σ exp(z - m_r). With m the largest m_r,

    log p_v = (z_v - m) - log Σ_r A_r exp(m_r - m)

m and the logarithm stay apart: their sum would round away the digits of log p where logits are large.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# Shapes: n tokens; tp ranks of `group`; c real columns of this rank; r rows of a block

BLOCK_ELEMENTS = 2**20  # of a buffer of scratch on a CPU; a device is kept busy with more


def token_blocks(logits: torch.Tensor, columns: int) -> Iterator[slice]:
    """Consecutive tokens of `logits` [n, V] whose [r, columns] are a block: scratch does not grow with the tokens."""
    elements = BLOCK_ELEMENTS if logits.device.type == "cpu" else 16 * BLOCK_ELEMENTS
    rows = max(1, elements // max(1, columns))
    for start in range(0, len(logits), rows):
        yield slice(start, min(start + rows, len(logits)))


def vocabulary_total(width: int, group: ProcessGroup | None, vocab_size: int | None) -> int:
    """Tokens in the vocabulary, from this rank's `width` columns if it is not given."""
    if vocab_size is not None:
        return vocab_size
    return width if group is None else width * dist.get_world_size(group)


def gather_ranks(values: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """[tp, n, w] of [n, w] that every rank holds in the same shape: one collective."""
    if group is None:
        return values.unsqueeze(0)
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


def own_normalizer(logits: torch.Tensor) -> torch.Tensor:
    """[r, 2] maximum and Σ exp(z - maximum) of [r, c]; -inf and 0 where there is no column, or all are -inf."""
    if logits.shape[1] == 0:
        return logits.new_tensor([-torch.inf, 0.0]).expand(len(logits), 2)
    maximum = logits.amax(-1, keepdim=True)
    return torch.cat([maximum, (logits - _finite(maximum)).exp().sum(-1, keepdim=True)], dim=-1)


def join_normalizers(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and log Σ exp(z - maximum), each [n, 1], of the parts [ranks, n, 2]."""
    maxima, sums = parts.unbind(-1)
    maximum = maxima.amax(0)
    return maximum.unsqueeze(-1), (sums * (maxima - _finite(maximum)).exp()).sum(0).log().unsqueeze(-1)


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    # -inf - -inf would be NaN
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
