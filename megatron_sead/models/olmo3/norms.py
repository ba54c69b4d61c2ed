"""OLMo's Q and K norms: over the full width of a projection that is sharded over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.distributed import ProcessGroup

from megatron_sead.models.fused import fused_on_gpu

# Shapes: s sequence, b batch, w width of a projection, tp tensor-parallel ranks


class ProjectionRMSNorm(torch.nn.Module):
    """OLMo's Q or K norm: its mean runs over all heads, of which this rank has only some.

    Weight [w/tp], sharded as the projection's rows. Not marked sequence_parallel: the projection has gathered the
    sequence, so each rank sees every token, and its weight's gradient is whole.
    """

    def __init__(self, config: TransformerConfig, width: int, group: ProcessGroup) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.width = width
        self.tp_group = group
        self.weight = torch.nn.Parameter(
            torch.ones(width // group.size(), dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor, sum_of_squares: torch.Tensor) -> torch.Tensor:
        """x [s, b, w/tp] with the sum [s, b, 1] over the whole width, from `sums_of_squares`."""
        return Scale.apply(x, sum_of_squares / self.width, self.weight, self.eps)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: sharded along axis 0."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def sums_of_squares(tensors: list[torch.Tensor], group: ProcessGroup) -> tuple[torch.Tensor, ...]:
    """Of each [s, b, w/tp], over the whole width w: [s, b, 1]. One all-reduce for all of them."""
    return SumOverRanks.apply(torch.stack([SumOfSquares.apply(x) for x in tensors]), group).unbind(0)


class SumOfSquares(torch.autograd.Function):
    """[s, b, w] -> [s, b, 1] in fp32 or wider. Keeps its input alone, where autograd would keep a wide copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _sum_of_squares(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return _sum_of_squares_backward(x, grad)


@fused_on_gpu
def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.square().sum(-1, keepdim=True)


@fused_on_gpu
def _sum_of_squares_backward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return (x * (2 * grad)).to(x.dtype)


class Scale(torch.autograd.Function):
    """weight * x / sqrt(mean_square + eps), computed wide and cast last. Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mean_square: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        root = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(x, root, weight)
        return _scaled(x, root, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, root, weight = ctx.saved_tensors
        return *_scaled_backward(x, root, weight, grad), None


@fused_on_gpu
def _scaled(x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * root).mul_(weight).to(x.dtype)


@fused_on_gpu
def _scaled_backward(
    x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the mean square and of the weight."""
    normalized = (x * root).mul_(grad)  # times the gradient
    grad_weight = normalized.flatten(0, -2).sum(0)
    grad_mean = -0.5 * root.square() * normalized.mul_(weight).sum(-1, keepdim=True)
    return (grad * root).mul_(weight).to(x.dtype), grad_mean, grad_weight.to(weight.dtype)


class SumOverRanks(torch.autograd.Function):
    """All-reduce, in backward too: every rank's output depends on every rank's input through the sum.

    Without the backward one, values are exact and gradients are off by several percent.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grad, ctx.group), None


def _all_reduce(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
