"""Llama's rotary angles, scaled as Llama 3.1's are where the model says so."""

from __future__ import annotations

import math

import torch
from torch.distributed import ProcessGroup

from megatron_sead.models.llama.config import LlamaConfig
from megatron_sead.models.llama.hf_config import Llama3Scaling
from megatron_sead.models.rotary import RotaryAngles, plain_frequencies


def rotary(config: LlamaConfig, cp_group: ProcessGroup) -> RotaryAngles:
    """The module that makes the angles of a model's layers."""
    assert config.kv_channels is not None
    frequencies = plain_frequencies(config.kv_channels, config.theta)
    return RotaryAngles(config, scaled(frequencies, config.scaling), cp_group)


def scaled(frequencies: torch.Tensor, scaling: Llama3Scaling | None) -> torch.Tensor:
    """Radians a position [d/2], fp32: waves that fit less than low_frequency_factor times into the original length are
    stretched by the factor, those that fit more than high_frequency_factor times are kept.
    """
    if scaling is None:
        return frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_length / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
