"""What this device can do at most, measured: bytes moved by a large copy, operations of a large bf16 product."""

from __future__ import annotations

import torch

from loss_benchmark.cases import DTYPES, FUSED, LOGITS, Case
from loss_benchmark.meters import seconds

COPY_BYTES = 2**30
SIDE = 8192  # of the square matrices
REPEATS = 10


def device_ceilings(device: torch.device) -> dict[str, float]:
    """By form, what `least_work` counts, a second: bytes read and written, and operations."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    copying = min(seconds(lambda: target.copy_(source), device) for _ in range(REPEATS))
    multiplying = min(seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(REPEATS))
    return {
        LOGITS: 2 * COPY_BYTES / copying,
        FUSED: 2 * SIDE**3 / multiplying,
    }


def least_work(case: Case) -> float:
    """Bytes that a rank must move (LOGITS) or operations that it must do (FUSED), whatever the implementation.

    Logits: both shards are read for the sums, read again for the gradient, and the gradient is written.
    """
    if case.form == LOGITS:
        return 5 * case.tokens * case.columns * DTYPES[case.dtype].itemsize
    return 4 * 2 * case.active * case.columns * case.hidden
