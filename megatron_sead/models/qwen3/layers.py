"""Qwen3's attention, and its layers of one model chunk."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed import ProcessGroup

from megatron_sead.models.attention import RotaryAttention
from megatron_sead.models.layers import dense_block_spec
from megatron_sead.models.qwen3.config import Qwen3Config
from megatron_sead.models.rotary import RotaryAngles, plain_frequencies

# Shapes: s sequence, b batch, d head dimension, and on this rank n query heads, g key/value heads


class Qwen3Attention(RotaryAttention):
    """Every head's query and key are normalised, all of them with the same weights."""

    def normalize(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """query [s, b, n, d], key [s, b, g, d]: each over d."""
        return self.q_layernorm(query), self.k_layernorm(key)


block_spec = partial(dense_block_spec, attention=Qwen3Attention, norm_heads=True)


def rotary(config: Qwen3Config, cp_group: ProcessGroup) -> RotaryAngles:
    """The module that makes the angles of a model's layers."""
    assert config.kv_channels is not None
    return RotaryAngles(config, plain_frequencies(config.kv_channels, config.theta), cp_group)
