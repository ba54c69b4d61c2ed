"""The configuration that the layers of every family need beyond Megatron's own TransformerConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from megatron_sead.config.stages import StageLayers


@dataclass
class ModelConfig(TransformerConfig):
    """Configuration of a dense decoder. A family adds fields, and overrides methods.

    No field is named as Megatron's ``yarn_*``: it would then scale every layer's rotary embedding.
    """

    model_type: str = ""  # of its config.json
    vocab_size: int = 0  # true
    padded_vocab_size: int = 0
    max_position_embeddings: int = 0
    tied_embeddings: bool = False  # the head is the embedding
    stage_layers: StageLayers = ()  # of each chunk of each pipeline stage
    sequence_parallel_output: bool = False  # final hidden states are handed out sharded, not gathered

    def window(self, layer_number: int) -> int | None:
        """Tokens that a query of layer `layer_number` sees, itself included (from 1, over the whole model)."""
        return None

    def attention_scale(self, layer_number: int) -> float:
        """What scores are multiplied by."""
        assert self.kv_channels is not None
        return 1 / math.sqrt(self.kv_channels)

    def layer_kind(self, layer_number: int) -> str:
        """A word for a layer in messages."""
        return "full"

    @property
    def lengths_of_change(self) -> dict[str, int]:
        """Lengths beyond which a wrong window or rotary scaling shows, by what it is; shorter texts hide such a
        mistake."""
        return {}
