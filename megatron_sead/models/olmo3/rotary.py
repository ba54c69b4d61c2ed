"""Rotary angles of both kinds of layer: plain for sliding layers, YaRN for full ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_sead.models.olmo3.config import Olmo3Config, YarnScaling

# Shapes: s sequence, b batch, n heads, d head dimension

PLAIN, YARN = 0, 1  # places in the first dimension of the stacked angles


class DualRotaryEmbedding(RotaryEmbedding):
    """Angles [2, s, 1, 1, d], fp32: at PLAIN and at YARN.

    One tensor, because Megatron hands one from the model to its layers, and through recompute only tensors pass.
    """

    def __init__(self, config: Olmo3Config, cp_group: torch.distributed.ProcessGroup) -> None:
        assert config.kv_channels is not None
        super().__init__(config.kv_channels, rotary_percent=1.0, rotary_base=int(config.full_theta), cp_group=cp_group)
        self.frequencies = torch.stack(
            [
                inverse_frequencies(config.kv_channels, config.sliding_theta, None),
                inverse_frequencies(config.kv_channels, config.full_theta, config.yarn),
            ]
        )

    def forward(self, max_seq_len: int, **kwargs: Any) -> torch.Tensor:
        """Angles of positions 0 .. max_seq_len - 1."""
        device = torch.device(torch.cuda.current_device())
        self.frequencies = self.frequencies.to(device)
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=device)
        angles = positions[None, :, None] * self.frequencies[:, None, :]
        return torch.cat([angles, angles], dim=-1)[:, :, None, None, :]


def inverse_frequencies(dimension: int, theta: float, yarn: YarnScaling | None) -> torch.Tensor:
    """Radians a position, [d/2] fp32.

    YaRN ("NTK-by-parts", arXiv 2309.00071 section 3.2): dimensions that turn more than beta_fast times within the
    original length are kept, those that turn less than beta_slow times are slowed by the factor, a ramp between.
    """
    plain = 1.0 / theta ** (torch.arange(0, dimension, 2, dtype=torch.float32, device="cpu") / dimension)
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


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate x [s, b, n, d] by angles [s, 1, 1, d]. In fp32, then back: bf16 cosines cost three digits of position."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * angles.cos() + turned * angles.sin()).to(x.dtype)
