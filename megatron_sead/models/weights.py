"""Which Hugging Face tensors a Megatron parameter is made of, declared once, read in both directions.

A family declares its layers with `Weight`; embedding, final norm and head are the same in all of them. No torch here:
a plan counts parameters by the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_sead.models.family import family_of

if TYPE_CHECKING:
    import torch

# Shapes: H hidden size, F feed-forward size, V true vocabulary, d head dimension, G key/value heads, r queries a key

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


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

    def runs(self) -> list[Run]:
        """What `join` does to whole tensors, as runs of rows, in Megatron's order."""
        rows = self.blocks or tuple(shape[0] for shape in self.shapes)
        return [
            Run(part, turn * rows[part], turn * sum(rows) + sum(rows[:part]), rows[part])
            for turn in range(self.shapes[0][0] // rows[0])
            for part in range(len(rows))
        ]


@dataclass(frozen=True)
class NamedWeight:
    """A `Weight` of the whole model, with the full names of its Hugging Face tensors."""

    weight: Weight
    layer: int | None  # from 0, over the whole model; None: outside the layers
    names: tuple[str, ...]


@dataclass(frozen=True)
class PlacedWeight:
    """A `Weight` of the whole model with full names, and the chunk that holds it."""

    weight: Weight
    parameter: str  # within its chunk
    names: tuple[str, ...]  # Hugging Face
    pp_rank: int
    chunk: int
    is_copy: bool = False  # a tied head on another stage than the embedding: the same tensor, trained as one


def embedding_weight(config: Any) -> Weight:
    """What the chunk with the embedding holds before its layers; the head too, where it is tied."""
    return Weight(
        "embedding.word_embeddings.weight",
        (EMBEDDING,),
        ((config.vocab_size, config.hidden_size),),
        tp_dim=0,
        padded_rows=config.padded_vocab_size,
        again=HEAD if config.tied_embeddings else None,
    )


def last_stage_weights(config: Any) -> list[Weight]:
    """What the chunk with the head holds after its layers, beside a head that is the embedding."""
    norm = Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((config.hidden_size,),))
    if config.tied_embeddings:
        return [norm]
    shape = (config.vocab_size, config.hidden_size)
    return [norm, Weight("output_layer.weight", (HEAD,), (shape,), tp_dim=0, padded_rows=config.padded_vocab_size)]


def attention_weights(config: Any) -> list[Weight]:
    """Of the projections of a layer's attention without biases. By key/value head: its r queries, its key, its value.

    Megatron's names are relative to ``decoder.layers.l.``, Hugging Face's to ``model.layers.L.``.
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
    """Of a layer's SwiGLU without biases."""
    h, ffn = config.hidden_size, config.ffn_hidden_size
    return [
        Weight("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ((ffn, h), (ffn, h)), tp_dim=0),
        Weight("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ((h, ffn),), tp_dim=1),
    ]


def pre_norm_weights(config: Any) -> list[Weight]:
    """Of the norms before a layer's attention and before its feed-forward."""
    shape = (config.hidden_size,)
    return [
        Weight("input_layernorm.weight", ("input_layernorm.weight",), (shape,)),
        Weight("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), (shape,)),
    ]


def named_weights(config: Any) -> Iterator[NamedWeight]:
    """Every weight of a model, in Hugging Face's order: embedding, layers, final norm, head.

    Args:
        config: a `ModelConfig`, or any object with the fields of `config_fields` as attributes.
    """
    embedding, layer_weights = embedding_weight(config), family_of(config.model_type).layer_weights(config)
    yield NamedWeight(embedding, None, embedding.huggingface)
    for layer in range(config.num_layers):
        for weight in layer_weights:
            yield NamedWeight(weight, layer, tuple(f"model.layers.{layer}.{name}" for name in weight.huggingface))
    for weight in last_stage_weights(config):
        yield NamedWeight(weight, None, weight.huggingface)


def tensor_shapes(weights: list[NamedWeight]) -> dict[str, tuple[int, ...]]:
    """Of every Hugging Face tensor of these weights, in their order."""
    return {name: shape for named in weights for name, shape in zip(named.names, named.weight.shapes, strict=True)}


def placed_weights(config: Any, pp_size: int, chunks: int) -> Iterator[PlacedWeight]:
    """`named_weights`, and where each is with so many pipeline stages and model chunks on each.

    The head of a tied model is the embedding. With several stages the last one holds a copy, which comes last.
    """
    first_stage = True
    per_chunk = config.num_layers // (pp_size * chunks)
    for named in named_weights(config):
        parameter, pp_rank, chunk = named.weight.megatron, 0, 0
        if named.layer is not None:
            first_stage = False
            chunk, pp_rank = divmod(named.layer // per_chunk, pp_size)  # Megatron deals them out round robin
            parameter = f"decoder.layers.{named.layer % per_chunk}.{parameter}"
        elif not first_stage:
            chunk, pp_rank = chunks - 1, pp_size - 1
        yield PlacedWeight(named.weight, parameter, named.names, pp_rank, chunk)
    if config.tied_embeddings and pp_size > 1:
        embedding = embedding_weight(config)
        place = pp_size - 1, chunks - 1
        yield PlacedWeight(embedding, "output_layer.weight", embedding.huggingface, *place, is_copy=True)
