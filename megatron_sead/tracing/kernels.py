"""The kernels that a GPU would take, where a build of torch without CUDA would take others with other memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional

from megatron_sead.tracing.shadows import set_shadow

FUSED = (torch.bfloat16, torch.float16)  # what FlashAttention takes
ON_CUDA_ALONE = {"aten::_fused_rms_norm"}  # operators with a kernel there, and a formula elsewhere
MASK_GRAIN = 16  # elements, to which ATen aligns the rows of an attention bias
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

_kernels = torch.library.Library("aten", "IMPL")  # gone with this object


_sums = torch.Generator()


def restart_sums() -> None:
    """What Triton kernels would compute begins anew: ranks that see the same tokens are to see the same numbers."""
    _sums.manual_seed(0)


@functools.cache
def install_kernels() -> None:
    """Idempotent; for the rest of the process."""
    _keep_whole_operators()
    functional.scaled_dot_product_attention = functools.wraps(functional.scaled_dot_product_attention)(
        functools.partial(_attention, functional.scaled_dot_product_attention)
    )
    from megatron_sead.distillation import kernels

    if kernels._on_cuda() is not kernels.eager:
        from megatron_sead.distillation.kernels import triton_rows

        for name in ("_span_kernel", "_row_kernel", "_gradient_kernel"):
            setattr(triton_rows, name, NoLaunch(name))


class NoLaunch:
    """Stands for a Triton kernel: checks where its tensors are, and computes nothing.

    The sums of `_row_kernel` become those of distributions whose entropies differ from token to token, so that zones
    are as large as they should be.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
                    raise RuntimeError(f"{self.name}: a tensor of shape {list(tensor.shape)} is on {tensor.device}")
            if self.name == "_row_kernel":
                self._sum(args[6])

        return launch

    def _sum(self, sums: torch.Tensor) -> None:
        """[k, 6]: A and B from 1 to 10, the others zero; an entropy is the logarithm of A or B."""
        with unset_fake_temporarily():
            values = torch.zeros(*sums.shape)
            values[:, :2].uniform_(1, 10, generator=_sums)
        set_shadow(sums, values)


def _keep_whole_operators() -> None:
    """Operators with a kernel on the CPU and a formula for other devices have one on CUDA too, which is not in this
    build, and so have a few others: the formula would run, with temporaries that no GPU makes."""

    def not_called(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a fake CUDA kernel was called")

    for name in torch._C._dispatch_get_all_op_names():
        formula = has_kernel(name, "CompositeImplicitAutograd")
        whole = has_kernel(name, "CPU") or name in ON_CUDA_ALONE
        if name.startswith("aten::") and formula and whole and not has_kernel(name, "CUDA"):
            _kernels.impl(name.removeprefix("aten::"), not_called, "CUDA")


def _attention(
    plain: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """FlashAttention in half precision without a mask, else the memory-efficient kernel."""
    if not query.is_cuda or enable_gqa:
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    options = {"scale": scale}
    if attn_mask is None and query.dtype in FUSED:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, **options)[0]
    bias = None if attn_mask is None else _bias(attn_mask, query).expand(*query.shape[:3], key.shape[2])
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, needs_gradient, dropout_p, is_causal, **options)[0]


def _bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask as ATen hands it to the kernel: of the query's type, rows aligned."""
    if mask.dtype == torch.bool:
        zero, never = query.new_zeros(()), query.new_full((), -torch.inf)
        mask = torch.where(mask, zero, never)
    width = mask.shape[-1]
    if width % MASK_GRAIN:
        mask = functional.pad(mask, (0, -width % MASK_GRAIN))[..., :width]
    return mask
