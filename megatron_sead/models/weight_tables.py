"""Which Hugging Face tensors a Megatron parameter is made of, declared once, read in both directions.

A family declares its layers with `Weight`, from the tables here as far as it shares them; embedding, final norm and
head are the same in all families. No torch here: a plan counts parameters by the same tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Shapes: H hidden size, F feed-forward size, V true vocabulary, d head dimension, G key/value heads, r queries a key

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class RowSpan(NamedTuple):
    """Rows that follow one another in a Hugging Face tensor and in Megatron's."""

    part: int  # which Hugging Face tensor
    row: int  # first one there
    megatron_row: int  # first one in Megatron's whole tensor
    rows: int

    def overlap(self, megatron_row: int, rows: int) -> tuple[slice, int] | None:
        """Which of `rows` rows from `megatron_row` on are in the span, and the Hugging Face row of the first one."""
        first = max(self.megatron_row, megatron_row)
        last = min(self.megatron_row + self.rows, megatron_row + rows)
        if first >= last:
            return None
        return slice(first - megatron_row, last - megatron_row), self.row + first - self.megatron_row


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter.

    A rank's shard is `join` of the same share of each Hugging Face tensor along `tp_dim`; `split` undoes `join`.
    """

    megatron: str  # within the chunk, or within the layer
    huggingface: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors, whole
    tp_dim: int | None = None  # None: the same on every tensor-parallel rank
    blocks: tuple[int, ...] | None = None  # rows taken of each tensor in turn; None: all of one, then of the next
    padded_rows: int | None = None  # rows in Megatron, zero beyond the true ones
    again: str | None = None  # the name under which some files hold the same tensor once more

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of Megatron's tensor over all tensor-parallel ranks, without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @property
    def elements(self) -> int:
        """How many the Hugging Face tensors have."""
        return math.prod(self.whole_shape)

    def rank_elements(self, tp: int) -> int:
        """How many one of `tp` tensor-parallel ranks holds, padding included."""
        rows, *rest = self.whole_shape
        return (self.padded_rows or rows) * math.prod(rest) // (1 if self.tp_dim is None else tp)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Megatron's tensor, or a rank's shard of it."""
        import torch

        if len(parts) == 1:
            return parts[0]
        if self.blocks is None:
            return torch.cat(parts)
        blocks = [part.unflatten(0, (-1, rows)) for part, rows in zip(parts, self.blocks, strict=True)]
        return torch.cat(blocks, 1).flatten(0, 1)

    def split(self, shard: torch.Tensor) -> list[torch.Tensor]:
        """The same share of each Hugging Face tensor, from Megatron's."""
        if self.blocks is None:
            return list(shard.chunk(len(self.shapes)))
        blocks = shard.unflatten(0, (-1, sum(self.blocks))).split(list(self.blocks), dim=1)
        return [block.flatten(0, 1) for block in blocks]

    def row_spans(self) -> list[RowSpan]:
        """What `join` does to whole tensors, as spans of rows, in Megatron's order."""
        rows = self.blocks or tuple(shape[0] for shape in self.shapes)
        return [
            RowSpan(part, turn * rows[part], turn * sum(rows) + sum(rows[:part]), rows[part])
            for turn in range(self.shapes[0][0] // rows[0])
            for part in range(len(rows))
        ]


def embedding_weight(config: Any) -> Weight:
    """The embedding, which the first chunk holds before its layers; a tied head is the same weight."""
    return Weight(
        "embedding.word_embeddings.weight",
        (EMBEDDING,),
        ((config.vocab_size, config.hidden_size),),
        tp_dim=0,
        padded_rows=config.padded_vocab_size,
        again=HEAD if config.tied_embeddings else None,
    )


def last_stage_weights(config: Any) -> list[Weight]:
    """The final norm, and the head unless it is tied: what the last chunk holds after its layers."""
    norm = Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((config.hidden_size,),))
    if config.tied_embeddings:
        return [norm]
    shape = (config.vocab_size, config.hidden_size)
    return [norm, Weight("output_layer.weight", (HEAD,), (shape,), tp_dim=0, padded_rows=config.padded_vocab_size)]


def attention_weights(config: Any) -> list[Weight]:
    """The projections of a layer's attention without biases.

    Megatron's rows go by key/value head: its r queries, its key, its value. Megatron's names are relative to
    ``decoder.layers.l.``, Hugging Face's to ``model.layers.L.``.
    """
    h, d = config.hidden_size, config.kv_channels
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    return [
        Weight(
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            ((q, h), (kv, h), (kv, h)),
            tp_dim=0,
            blocks=(config.num_attention_heads // config.num_query_groups * d, d, d),
        ),
        Weight("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ((h, q),), tp_dim=1),
    ]


def gated_mlp_weights(config: Any) -> list[Weight]:
    """The matrices of a layer's SwiGLU without biases."""
    h, ffn = config.hidden_size, config.ffn_hidden_size
    return [
        Weight("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ((ffn, h), (ffn, h)), tp_dim=0),
        Weight("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ((h, ffn),), tp_dim=1),
    ]


def pre_norm_weights(config: Any) -> list[Weight]:
    """The norms before a layer's attention and before its feed-forward."""
    shape = (config.hidden_size,)
    return [
        Weight("input_layernorm.weight", ("input_layernorm.weight",), (shape,)),
        Weight("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), (shape,)),
    ]
