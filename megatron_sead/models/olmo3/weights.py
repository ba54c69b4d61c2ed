"""Which Hugging Face tensors a Megatron parameter is made of, declared once, read in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_sead.models.olmo3.config import Olmo3Config

# Shapes: H hidden size, F feed-forward size, V true vocabulary, d head dimension, G key/value heads, r queries a key

Parts = list[torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter.

    A rank's shard is `join` of the same share of each Hugging Face tensor along `tp_dim`; `split` undoes `join`.
    """

    megatron: str  # within the chunk, or within the layer
    huggingface: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors, whole
    tp_dim: int | None = None  # None: the same on every tensor-parallel rank
    join: Callable[[Parts], torch.Tensor] = lambda parts: parts[0]
    split: Callable[[torch.Tensor], Parts] = lambda shard: [shard]
    padded_rows: int | None = None  # rows in Megatron, zero beyond the true ones


def first_stage_weights(config: Olmo3Config) -> list[Weight]:
    """What the chunk with the embedding holds before its layers."""
    shape = (config.vocab_size, config.hidden_size)
    return [
        Weight(
            "embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            (shape,),
            tp_dim=0,
            padded_rows=config.padded_vocab_size,
        )
    ]


def last_stage_weights(config: Olmo3Config) -> list[Weight]:
    """What the chunk with the head holds after its layers."""
    shape = (config.vocab_size, config.hidden_size)
    return [
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((config.hidden_size,),)),
        Weight("output_layer.weight", ("lm_head.weight",), (shape,), tp_dim=0, padded_rows=config.padded_vocab_size),
    ]


def layer_weights(config: Olmo3Config) -> list[Weight]:
    """One layer. Megatron's names are relative to ``decoder.layers.l.``, Hugging Face's to ``model.layers.L.``."""
    assert config.kv_channels is not None and config.num_query_groups is not None
    h, ffn, d = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    r = config.num_attention_heads // config.num_query_groups

    def join_qkv(parts: Parts) -> torch.Tensor:
        """By key/value head: its r queries, its key, its value."""
        return torch.cat([x.unflatten(0, (-1, rows * d)) for x, rows in zip(parts, (r, 1, 1), strict=True)], 1).flatten(
            0, 1
        )

    def split_qkv(shard: torch.Tensor) -> Parts:
        groups = shard.unflatten(0, (-1, (r + 2) * d)).split([r * d, d, d], dim=1)
        return [x.flatten(0, 1) for x in groups]

    attention, mlp = "self_attention", "mlp"
    return [
        Weight(
            f"{attention}.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            ((q, h), (kv, h), (kv, h)),
            tp_dim=0,
            join=join_qkv,
            split=split_qkv,
        ),
        Weight(f"{attention}.q_layernorm.weight", ("self_attn.q_norm.weight",), ((q,),), tp_dim=0),
        Weight(f"{attention}.k_layernorm.weight", ("self_attn.k_norm.weight",), ((kv,),), tp_dim=0),
        Weight(f"{attention}.linear_proj.weight", ("self_attn.o_proj.weight",), ((h, q),), tp_dim=1),
        Weight(
            f"{mlp}.linear_fc1.weight",
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            ((ffn, h), (ffn, h)),
            tp_dim=0,
            join=torch.cat,
            split=lambda shard: list(shard.chunk(2)),
        ),
        Weight(f"{mlp}.linear_fc2.weight", ("mlp.down_proj.weight",), ((h, ffn),), tp_dim=1),
        Weight("post_attention_layernorm.weight", ("post_attention_layernorm.weight",), ((h,),)),
        Weight("post_feedforward_layernorm.weight", ("post_feedforward_layernorm.weight",), ((h,),)),
    ]
