"""Llama's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sead.models.config import ModelConfig
from megatron_sead.models.llama.hf_config import Llama3Scaling


@dataclass
class LlamaConfig(ModelConfig):
    """What Llama's layers need to know beyond that."""

    theta: float = 10000.0  # rotary base
    scaling: Llama3Scaling | None = None

    @property
    def lengths_of_change(self) -> dict[str, int]:
        return {"llama3 scaling from": self.scaling.original_length} if self.scaling is not None else {}
