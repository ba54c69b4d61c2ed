"""The elementwise work on rows of logits: the same three functions as Triton kernels, compiled, and eager."""

from __future__ import annotations

from types import ModuleType

import torch

from megatron_sead.distillation.kernels import compiled, eager


def row_kernels(logits: torch.Tensor, rows: int, real: int) -> ModuleType:
    """The module whose `pair_sums`, `single_sums` and `write_gradient` serve this many rows of `logits` [n, V]."""
    return compiled if compiled.is_worth_compiling(logits, rows, real) else eager
