"""Rotary angles of both kinds of layer: plain for sliding layers, YaRN for full ones."""

from __future__ import annotations

import math

import torch

from megatron_sead.models.olmo3.config import Olmo3Config, YarnScaling
from megatron_sead.models.rotary import RotaryAngles, plain_frequencies

# Shapes: s sequence, d head dimension

PLAIN, YARN = 0, 1  # places in the first dimension of the stacked angles


class DualRotaryEmbedding(RotaryAngles):
    """Angles [2, s, 1, 1, d], fp32: at PLAIN and at YARN.

    One tensor, because Megatron hands one from the model to its layers, and through recompute only tensors pass.
    """

    def __init__(self, config: Olmo3Config, cp_group: torch.distributed.ProcessGroup) -> None:
        assert config.kv_channels is not None
        plain = inverse_frequencies(config.kv_channels, config.sliding_theta, None)
        yarn = inverse_frequencies(config.kv_channels, config.full_theta, config.yarn)
        super().__init__(config, torch.stack([plain, yarn]), cp_group)


def inverse_frequencies(dimension: int, theta: float, yarn: YarnScaling | None) -> torch.Tensor:
    """Radians a position, [d/2] fp32.

    YaRN ("NTK-by-parts", arXiv 2309.00071 section 3.2): dimensions that turn more than beta_fast times within the
    original length are kept, those that turn less than beta_slow times are slowed by the factor, a ramp between.
    """
    plain = plain_frequencies(dimension, theta)
    if yarn is None:
        return plain

    def dimension_of(turns: float) -> float:
        return dimension * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimension - 1)
    width = max(high - low, 0.001)  # never a division by zero
    slowed = ((torch.arange(dimension // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return plain / yarn.factor * slowed + plain * (1 - slowed)
