"""Sizes of a run's models, from their config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from types import SimpleNamespace
from typing import Any

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.config.stages import PipelineSplit, StageLayers, student_split, teacher_split
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.layout import stage_layers
from megatron_sead.models.weights import PlacedWeight, named_weights, placed_weights
from megatron_sead.planning.tokenizer_files import require_model_directory


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    role: str  # student or teacher
    fields: Any = dataclass_field(repr=False)  # of `config_fields`, as attributes

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Of the Hugging Face checkpoint: true vocabulary, no padding."""
        return sum(named.weight.elements for named in named_weights(self.fields))

    def rank_parameters(self, stage: int, parallel: ParallelSettings) -> int:
        """On one tensor-parallel rank of a pipeline stage, padded vocabulary rows included."""
        tp = parallel.tensor_model_parallel_size
        return sum(placed.weight.rank_elements(tp) for placed in self.placed(stage, parallel))

    def placed(self, stage: int, parallel: ParallelSettings) -> list[PlacedWeight]:
        """The weights on a pipeline stage."""
        stages = self.stage_layers(parallel)
        return [placed for placed in placed_weights(self.fields, stages) if placed.pp_rank == stage]

    def split(self, parallel: ParallelSettings) -> PipelineSplit:
        """How the settings spread this model's layers."""
        return (student_split if self.role == "student" else teacher_split)(parallel)

    def stage_layers(self, parallel: ParallelSettings) -> StageLayers:
        """The layers of each chunk of each pipeline stage."""
        return stage_layers(vars(self.fields), self.split(parallel), f"the {self.role}")

    @property
    def padded_vocabulary(self) -> int:
        return int(self.fields.padded_vocab_size)

    @property
    def norms_queries(self) -> bool:
        """Are queries and keys normalised, over all heads or head by head?"""
        return any(named.weight.megatron.endswith("q_layernorm.weight") for named in named_weights(self.fields))

    def windows(self, stage: int, parallel: ParallelSettings) -> list[int | None]:
        """Of each layer on a pipeline stage: the tokens that a query sees; None: all before it."""
        kinds = getattr(self.fields, "layer_types", None)
        window = getattr(self.fields, "sliding_window", None)
        layers = sorted(
            {int(p.names[0].split(".")[2]) for p in self.placed(stage, parallel) if ".layers." in p.names[0]}
        )
        return [window if kinds and kinds[layer].startswith("sliding") else None for layer in layers]


def read_shape(model: ModelSettings, role: str) -> ModelShape:
    """Shape of a Hugging Face directory's model.

    Raises:
        UserError: no such directory, no readable config.json, or what `config_fields` refuses.
    """
    require_model_directory(model, role)
    fields = read_config_fields(model.path)
    return ModelShape(
        layers=fields["num_layers"],
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        kv_heads=fields["num_query_groups"],
        head_dim=fields["kv_channels"],
        ffn=fields["ffn_hidden_size"],
        vocabulary=fields["vocab_size"],
        context=fields["max_position_embeddings"],
        role=role,
        fields=SimpleNamespace(**fields),
    )
