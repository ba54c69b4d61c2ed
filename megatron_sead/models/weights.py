"""All weights of a model, their names in both formats, and which pipeline stage and chunk holds each. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sead.config.stages import StageLayers
from megatron_sead.models.family import family_of
from megatron_sead.models.weight_tables import Weight, embedding_weight, last_stage_weights


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


def placed_weights(config: Any, stages: StageLayers) -> Iterator[PlacedWeight]:
    """`named_weights`, and where each is when the stages' chunks have so many layers.

    The head of a tied model is the embedding. With several stages the last one holds a copy, which comes last.
    """
    pp_size, chunks = len(stages), len(stages[0])
    # Layers go through chunk 0 of every stage, then through chunk 1 of every stage
    homes = [
        (rank, chunk, place)
        for chunk in range(chunks)
        for rank in range(pp_size)
        for place in range(stages[rank][chunk])
    ]
    first_stage = True
    for named in named_weights(config):
        parameter, pp_rank, chunk = named.weight.megatron, 0, 0
        if named.layer is not None:
            first_stage = False
            pp_rank, chunk, place = homes[named.layer]
            parameter = f"decoder.layers.{place}.{parameter}"
        elif not first_stage:
            chunk, pp_rank = chunks - 1, pp_size - 1
        yield PlacedWeight(named.weight, parameter, named.names, pp_rank, chunk)
    if config.tied_embeddings and pp_size > 1:
        embedding = embedding_weight(config)
        home = pp_size - 1, chunks - 1
        yield PlacedWeight(embedding, "output_layer.weight", embedding.huggingface, *home, is_copy=True)
