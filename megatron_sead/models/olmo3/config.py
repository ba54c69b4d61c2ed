"""OLMo-3's configuration: Megatron's TransformerConfig with window, layer types and YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from megatron_sead.models.hf_config import FULL as FULL
from megatron_sead.models.hf_config import MODEL_TYPES as MODEL_TYPES
from megatron_sead.models.hf_config import SLIDING as SLIDING
from megatron_sead.models.hf_config import VOCABULARY_MULTIPLE as VOCABULARY_MULTIPLE
from megatron_sead.models.hf_config import YarnScaling as YarnScaling
from megatron_sead.models.hf_config import olmo3_fields as olmo3_fields


@dataclass
class Olmo3Config(TransformerConfig):
    """What the layers need to know beyond Megatron's own fields.

    No field is named as Megatron's ``yarn_*``: it would then scale every layer's rotary embedding.
    """

    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None  # tokens that a query of a sliding layer sees, itself included
    sliding_theta: float = 500000.0  # rotary base of sliding layers, and of full ones
    full_theta: float = 500000.0
    yarn: YarnScaling | None = None
    vocab_size: int = 0  # true
    padded_vocab_size: int = 0
    spread_hidden_states: bool = False  # under sequence parallelism: hand them out as they are, not gathered
    max_position_embeddings: int = 0

    def is_sliding(self, layer_number: int) -> bool:
        """Whether layer `layer_number` (from 1, over the whole model) has a window."""
        return self.layer_types[layer_number - 1] == SLIDING

    def attention_scale(self, layer_number: int) -> float:
        """What scores are multiplied by. YaRN's magnitude goes here, not into cos and sin: it is a constant."""
        assert self.kv_channels is not None
        factor = self.yarn.attention_factor if self.yarn is not None and not self.is_sliding(layer_number) else 1.0
        return factor**2 / math.sqrt(self.kv_channels)
