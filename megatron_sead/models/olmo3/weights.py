"""Which Hugging Face tensors a Megatron parameter is made of, declared once, read in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_sead.models.olmo3.config import Olmo3Config

# Shapes: H hidden size, F feed-forward size, V true vocabulary, d head dimension, G key/value heads, r queries a key

Parts = list[torch.Tensor]


class Run(NamedTuple):
    """Rows that follow one another in a Hugging Face tensor and in Megatron's."""

    part: int  # which Hugging Face tensor
    row: int  # first one there
    megatron_row: int  # first one in Megatron's whole tensor
    rows: int


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

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of Megatron's tensor over all tensor-parallel ranks, without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def runs(self) -> list[Run]:
        """What `join` does to whole tensors, as runs of rows, in Megatron's order: found by joining row numbers."""
        lengths = [shape[0] for shape in self.shapes]
        ends = torch.tensor(lengths).cumsum(0)
        order = self.join(list(torch.arange(sum(lengths)).split(lengths)))
        begins = torch.cat([order.new_tensor([True]), (order[1:] != order[:-1] + 1) | torch.isin(order[1:], ends)])
        starts = begins.nonzero().flatten()
        parts = torch.searchsorted(ends, order[starts], right=True).tolist()
        stops = [*starts[1:].tolist(), len(order)]
        first_rows = [0, *ends.tolist()]
        return [
            Run(part, int(order[start]) - first_rows[part], start, stop - start)
            for part, start, stop in zip(parts, starts.tolist(), stops, strict=True)
        ]


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
