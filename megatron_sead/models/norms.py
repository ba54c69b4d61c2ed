"""RMSNorm over the hidden size, or over a head.

torch's: on a GPU one kernel a pass, which keeps its input alone. It computes in fp32 (in fp64 where the input is),
multiplies by the weight there, and casts last, as transformers' OLMo does; others' cast before they multiply, which
rounds once more in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
