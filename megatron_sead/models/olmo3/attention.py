"""OLMo-3's attention: norms over the full width of Q and K, and rotary angles by layer type."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sead.models.attention import RotaryAttention
from megatron_sead.models.olmo3.config import Olmo3Config
from megatron_sead.models.olmo3.norms import ProjectionRMSNorm, sums_of_squares
from megatron_sead.models.olmo3.rotary import PLAIN, YARN

# Shapes: s sequence, b batch, d head dimension, and on this rank n query heads, g key/value heads


class Olmo3Attention(RotaryAttention):
    """Megatron's projections around OLMo-3's norms, rotary embedding and window."""

    config: Olmo3Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_layernorm = ProjectionRMSNorm(self.config, self.query_projection_size, self.tp_group)
        self.k_layernorm = ProjectionRMSNorm(self.config, self.kv_projection_size, self.tp_group)

    def normalize(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Over all heads of all tensor-parallel ranks."""
        heads, d = query.shape[-2], query.shape[-1]
        query, key = query.flatten(-2), key.flatten(-2)
        query_squares, key_squares = sums_of_squares([query, key], self.tp_group)
        query = self.q_layernorm(query, query_squares)
        key = self.k_layernorm(key, key_squares)
        return query.unflatten(-1, (heads, d)), key.unflatten(-1, (-1, d))

    def angles(self, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        """Of what `DualRotaryEmbedding` returns [2, s, 1, 1, d]: those of this kind of layer."""
        return rotary_pos_emb[PLAIN if self.config.is_sliding(self.layer_number) else YARN]
