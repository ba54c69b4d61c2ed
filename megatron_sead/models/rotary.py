"""Rotary angles (Su et al., arXiv 2104.09864), and what they do to queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_sead.models.config import ModelConfig
from megatron_sead.models.fused import fused_on_gpu
from megatron_sead.models.packed import PackedSequences

# Shapes: s sequence, t tokens of packed sequences, b batch, n heads, d head dimension


class RotaryAngles(RotaryEmbedding):
    """Angles [s, 1, 1, d], fp32, from frequencies [d/2]; of stacked frequencies [k, d/2], stacked angles."""

    def __init__(
        self, config: ModelConfig, frequencies: torch.Tensor, cp_group: torch.distributed.ProcessGroup
    ) -> None:
        assert config.kv_channels is not None
        super().__init__(config.kv_channels, rotary_percent=1.0, cp_group=cp_group)
        self.frequencies = frequencies

    def get_rotary_seq_len(
        self, context: Any, decoder: Any, hidden: Any, config: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> int | torch.Tensor:
        """What Megatron's model hands to `forward`: a length, or the positions [t] of packed sequences."""
        if isinstance(packed_seq_params, PackedSequences):
            assert packed_seq_params.positions is not None
            return packed_seq_params.positions
        length: int = super().get_rotary_seq_len(context, decoder, hidden, config, packed_seq_params, **kwargs)
        return length

    def forward(self, max_seq_len: int | torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Angles of positions 0 .. max_seq_len - 1; or of those that are given, [t]."""
        device = torch.device(torch.cuda.current_device())
        self.frequencies = self.frequencies.to(device, non_blocking=True)  # the first call moves them
        positions = torch.arange(max_seq_len, device=device) if isinstance(max_seq_len, int) else max_seq_len
        angles = positions.float()[:, None] * self.frequencies[..., None, :]
        return torch.cat([angles, angles], dim=-1)[..., None, None, :]


def plain_frequencies(dimension: int, theta: float) -> torch.Tensor:
    """Radians a position, [d/2] fp32."""
    return 1.0 / theta ** (torch.arange(0, dimension, 2, dtype=torch.float32, device="cpu") / dimension)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate x [s, b, n, d] by angles [s, 1, 1, d], of which the second half repeats the first. Differentiable in x.

    In fp32, then back: bf16 cosines cost three digits of position.
    """
    rotated: torch.Tensor = _Rotation.apply(x, angles)
    return rotated


class _Rotation(torch.autograd.Function):
    """Keeps the angles alone, which all layers share, where autograd would keep cosines and sines of every call."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(angles)
        return _turned(x, angles, back=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _turned(grad, *ctx.saved_tensors, back=True), None


@fused_on_gpu
def _turned(x: torch.Tensor, angles: torch.Tensor, *, back: bool) -> torch.Tensor:
    """x [s, b, n, d] turned by angles [s, 1, 1, d], or back by them."""
    angles = angles[..., : angles.shape[-1] // 2]
    cos, sin = angles.cos(), -angles.sin() if back else angles.sin()
    first, second = x.chunk(2, dim=-1)
    halves = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    return torch.cat(halves, dim=-1)
