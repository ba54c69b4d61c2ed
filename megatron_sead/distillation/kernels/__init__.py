"""The elementwise work on rows of logits: the same three functions as Triton kernels, in C++, and eager."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch

from megatron_sead.distillation.kernels import compiled, eager

log = logging.getLogger(__name__)


def row_kernels(rows: int, real: int, *logits: torch.Tensor) -> ModuleType:
    """The module whose `pair_sums`, `single_sums` and `write_gradient` serve this many rows of tensors [n, V]."""
    if logits[0].is_cuda and logits[0].dtype != torch.float64:
        return _on_cuda()
    return compiled if compiled.serves(rows, real, *logits) else eager


@functools.cache
def _on_cuda() -> ModuleType:
    if importlib.util.find_spec("triton") is None:  # torch's CUDA builds bring it, but for Windows
        log.warning("triton is not installed, so the loss runs eagerly on the GPU, and slower")
        return eager
    from megatron_sead.distillation.kernels import triton_rows

    return triton_rows
