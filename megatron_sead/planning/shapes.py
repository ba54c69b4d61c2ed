"""Sizes of a run's models, from their config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.config.stages import PipelineSplit, StageLayers, student_split, teacher_split
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.hf_config import FULL, SLIDING
from megatron_sead.models.layout import stage_layers
from megatron_sead.models.weight_tables import Weight
from megatron_sead.models.weights import PlacedWeight, named_weights, placed_weights
from megatron_sead.planning.tokenizer_files import require_model_directory

PROBE_MORE, MOST_PROBED = 64, 16384  # of `training.parity`


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
    _placed: dict[StageLayers, list[list[PlacedWeight]]] = dataclass_field(default_factory=dict, repr=False)

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
        if stages not in self._placed:
            self._placed[stages] = [[] for _ in stages]
            for placed in placed_weights(self.fields, stages):
                self._placed[stages][placed.pp_rank].append(placed)
        return self._placed[stages][stage]

    def split(self, parallel: ParallelSettings) -> PipelineSplit:
        """How the settings spread this model's layers."""
        return (student_split if self.role == "student" else teacher_split)(parallel)

    def stage_layers(self, parallel: ParallelSettings) -> StageLayers:
        """The layers of each chunk of each pipeline stage."""
        return stage_layers(vars(self.fields), self.split(parallel), f"the {self.role}")

    @property
    def padded_vocabulary(self) -> int:
        return int(self.fields.padded_vocab_size)

    @cached_property
    def layer_weights(self) -> dict[str, Weight]:
        """Of one layer, by Megatron's names."""
        return {named.weight.megatron: named.weight for named in named_weights(self.fields) if named.layer == 0}

    @property
    def norm(self) -> Literal["width", "head"] | None:
        """What queries and keys are normalised over: all heads, each head, or not at all."""
        weight = self.layer_weights.get("self_attention.q_layernorm.weight")
        if weight is None:
            return None
        return "head" if weight.tp_dim is None else "width"

    @property
    def post_norm(self) -> bool:
        """Do a layer's norms come after attention and feed-forward?"""
        return "post_feedforward_layernorm.weight" in self.layer_weights

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Of families with two kinds of layer, and of rotary angles."""
        return tuple(getattr(self.fields, "layer_types", None) or ())

    @property
    def all_windows(self) -> list[int | None]:
        """Of each layer: the tokens that a query sees; None: all before it."""
        window = getattr(self.fields, "sliding_window", None)
        kinds = self.layer_types or (FULL,) * self.layers
        return [window if kind == SLIDING else None for kind in kinds]

    @property
    def probe_tokens(self) -> int:
        """Of the text on which a run checks its models: longer than the window, and than rotary angles were before
        they were scaled."""
        scalings = (getattr(self.fields, name, None) for name in ("yarn", "scaling"))
        original = max((scaling.original_length for scaling in scalings if scaling is not None), default=0)
        window = getattr(self.fields, "sliding_window", None) or 0
        return min(max(window, original) + PROBE_MORE, self.context, MOST_PROBED)

    def windows(self, stage: int, parallel: ParallelSettings) -> list[int | None]:
        """`all_windows` of the layers on a pipeline stage."""
        layers = {int(p.names[0].split(".")[2]) for p in self.placed(stage, parallel) if ".layers." in p.names[0]}
        return [self.all_windows[layer] for layer in sorted(layers)]


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
