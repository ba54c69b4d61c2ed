"""Qwen3's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sead.models.config import ModelConfig


@dataclass
class Qwen3Config(ModelConfig):
    """What Qwen3's layers need to know beyond that."""

    theta: float = 10000.0  # rotary base
