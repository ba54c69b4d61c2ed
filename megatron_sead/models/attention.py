"""Attention of every family: Megatron's projections, rotary angles, and a core on torch's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention

from megatron_sead.models import windowed
from megatron_sead.models.config import ModelConfig
from megatron_sead.models.context_parallel import fetched
from megatron_sead.models.packed import PackedSequences
from megatron_sead.models.rotary import rotate

# Shapes: s sequence, b batch, H hidden size (s/tp tokens under sequence parallelism), and on this rank
# n query heads, g key/value heads, r = n/g queries a key, d head dimension

QUERY_BLOCK = 1024  # queries of a sliding layer that are scored at once, each block against its own keys alone
SMALL_BLOCK = 128  # fewer cost more in calls than they save in scores, however narrow the window


class RotaryAttention(SelfAttention):
    """Causal self-attention without biases. A family says what happens between projections and rotation."""

    config: ModelConfig

    def normalize(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """query [s, b, n, d] and key [s, b, g, d] before they are rotated: as they are."""
        return query, key

    def angles(self, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        """This layer's angles [s, 1, 1, d], of what the family's rotary embedding returns: all of it."""
        return rotary_pos_emb

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, H] -> ([s, b, H], no bias).

        Causal, and nothing else is masked: batches are padded on the right. Packed sequences, of which each sees
        itself alone, are in a batch of one.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        angles = self.angles(rotary_pos_emb)
        query, key = rotate(query, angles), rotate(key, angles)
        tokens = query.shape[:2]
        if packed_seq_params is not None:  # cores take packed sequences without a batch, as Megatron's do
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )
        else:
            context = self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=None,
                packed_seq_params=packed_seq_params,
            )
        # As a matrix, and back: with a batch of one the strides may be such that torch multiplies token by token
        return self.linear_proj(context.reshape(tokens.numel(), -1).unflatten(0, tokens))

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised, not yet rotated: query [s, b, n, d], key and value [s, b, g, d]."""
        mixed, _ = self.linear_qkv(hidden_states)
        g, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        r = self.num_attention_heads_per_partition // g
        query, key, value = mixed.unflatten(-1, (g, (r + 2) * d)).split([r * d, d, d], dim=-1)
        query, key = self.normalize(query.flatten(-2).unflatten(-1, (g * r, d)), key)
        return query, key, value


class TorchCoreAttention(torch.nn.Module):
    """Core attention on scaled_dot_product_attention: no score matrix is kept."""

    def __init__(
        self,
        config: ModelConfig,
        layer_number: int,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.window = config.window(layer_number)
        self.scale = config.attention_scale(layer_number)
        self.group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]; of packed sequences all without b."""
        if packed_seq_params is None:
            return self._rows(query, key, value)
        if packed_seq_params.share[1] > 1:
            return self._pieces(query, key, value, packed_seq_params)
        lengths = packed_seq_params.lengths
        if windowed.serves(query):
            starts, longest = (packed_seq_params.cu_seqlens_q,) * 2, (max(lengths),) * 2
            context = windowed.packed_attention(query, key, value, starts, longest, self.window, self.scale)
            return context.flatten(1)
        sequences = zip(*(x[:, None].split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._rows(*one) for one in sequences]).squeeze(1)

    def _pieces(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences
    ) -> torch.Tensor:
        """Of sequences that are shared with other ranks: query [t, n, d], key and value [t, g, d] -> [t, n * d]."""
        assert self.group is not None
        keys = packed.keys(self.window, query.device)
        one_kernel = windowed.serves(query)
        again = one_kernel and self.config.recompute_granularity is None  # else this runs again before its backward
        with fetched(torch.stack([key, value], dim=1), keys, self.group, again=again) as key_value:
            key, value = key_value.unbind(1)
            if one_kernel:
                starts, longest = (keys.query_starts, keys.key_starts), (max(keys.query_lengths), max(keys.key_lengths))
                context = windowed.packed_attention(query, key, value, starts, longest, self.window, self.scale)
                return context.flatten(1)
        parts = (query, keys.query_lengths), (key, keys.key_lengths), (value, keys.key_lengths)
        pieces = zip(*(x[:, None].split(lengths) for x, lengths in parts), strict=True)
        return torch.cat([self._rows(*one) for one in pieces]).squeeze(1)

    def _rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, n, d], key and value [k, b, g, d] -> [s, b, n * d]. Queries are the last of the keys."""
        if self.window is not None and len(query) > self.window and windowed.serves(query):
            return windowed.windowed_attention(query, key, value, self.window, self.scale).flatten(2)
        repeats = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (key, value))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.shape == key.shape and (self.window is None or query.shape[2] <= self.window):
            context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        else:
            context = banded_attention(query, key, value, self.window, self.scale)
        return context.permute(2, 0, 1, 3).flatten(2)


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    block: int = QUERY_BLOCK,
) -> torch.Tensor:
    """Causal attention over the last `window` tokens, the current one included; None: over all.

    query [b, n, s, d]; key and value [b, n, k, d], of which the last s are the queries' own tokens. Blocks of queries,
    each with the keys that any of them sees: s * (block + window) scores, never s * k.
    """
    length, keys = query.shape[2], key.shape[2]
    window = keys if window is None else window
    block = min(block, max(window, SMALL_BLOCK))
    blocks = []
    for start in range(keys - length, keys, block):
        end = min(start + block, keys)
        first = max(0, start - window + 1)
        behind = torch.arange(start, end, device=query.device)[:, None] - torch.arange(first, end, device=query.device)
        blocks.append(
            F.scaled_dot_product_attention(
                query[:, :, start - keys + length : end - keys + length],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=(behind >= 0) & (behind < window),
                scale=scale,
            )
        )
    return torch.cat(blocks, dim=2)
