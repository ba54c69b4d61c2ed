"""RMSNorm over the hidden size, or over a head.

It computes in fp32 (in fp64 where the input is), multiplies by the weight there, and casts last, as transformers' OLMo
does; others' cast before they multiply, which rounds once more in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

# Shapes: s sequence, b batch, h hidden size


class RMSNorm(torch.nn.Module):
    """Over the last dimension of [s, b, h]; the weight is the same on every tensor-parallel rank.

    Under sequence parallelism each rank normalises its part of the sequence, so the weight's gradients must be
    summed: the mark on the weight makes Megatron do so.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widen(x)
        return scale(x, wide, wide.square().mean(-1, keepdim=True), self.eps, self.weight)


def widen(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale(
    x: torch.Tensor, wide: torch.Tensor, mean_square: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    return (weight * (wide * torch.rsqrt(mean_square + eps))).to(x.dtype)
