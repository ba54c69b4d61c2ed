"""OLMo-3's configuration: window, layer types and YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sead.models.config import ModelConfig
from megatron_sead.models.hf_config import FULL as FULL
from megatron_sead.models.hf_config import SLIDING as SLIDING
from megatron_sead.models.olmo3.hf_config import YarnScaling as YarnScaling


@dataclass
class Olmo3Config(ModelConfig):
    """What OLMo's layers need to know beyond that."""

    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None  # tokens that a query of a sliding layer sees, itself included
    sliding_theta: float = 500000.0  # rotary base of sliding layers, and of full ones
    full_theta: float = 500000.0
    yarn: YarnScaling | None = None

    def is_sliding(self, layer_number: int) -> bool:
        """Whether layer `layer_number` (from 1, over the whole model) has a window."""
        return self.layer_types[layer_number - 1] == SLIDING

    def window(self, layer_number: int) -> int | None:
        return self.sliding_window if self.is_sliding(layer_number) else None

    def layer_kind(self, layer_number: int) -> str:
        return self.layer_types[layer_number - 1].removesuffix("_attention")

    def attention_scale(self, layer_number: int) -> float:
        """YaRN's magnitude goes here, not into cos and sin: it is a constant."""
        assert self.kv_channels is not None
        factor = self.yarn.attention_factor if self.yarn is not None and not self.is_sliding(layer_number) else 1.0
        return factor**2 / math.sqrt(self.kv_channels)

    @property
    def lengths_of_change(self) -> dict[str, int]:
        return {
            "sliding window": self.sliding_window or 0,
            "YaRN from": self.yarn.original_length if self.yarn is not None else 0,
        }
