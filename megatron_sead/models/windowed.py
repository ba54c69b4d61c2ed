"""Sliding windows on a GPU: FlashAttention over packed sequences, which skips keys that torch's masks only hide."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def serves(query: torch.Tensor) -> bool:
    """Is there a kernel for it: on CUDA, in bf16 or fp16, and in a torch (2.11) whose packed attention has windows?"""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _packed_attention()[0] is not None


def windowed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """Causal attention over the last `window` tokens, the current one included.

    Args:
        query: [s, b, n, d].
        key: [s, b, g, d], of which each serves n/g queries; so is value.

    Returns:
        [s, b, n, d].
    """
    length, batch, heads, _ = query.shape
    attention, parameters = _packed_attention()
    assert attention is not None  # `serves` said so
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    if not options and heads != key.shape[2]:
        key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    packed = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    context: torch.Tensor = attention(
        *packed, starts, starts, length, length, scale=scale, window_size=(window - 1, 0), **options
    )
    return context.unflatten(0, (batch, length)).transpose(0, 1)


@cache
def _packed_attention() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """torch's, and its parameters; none where it has no windows."""
    try:
        attention = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None, frozenset()
    parameters = frozenset(inspect.signature(attention).parameters)
    return (attention, parameters) if {"window_size", "scale"} <= parameters else (None, frozenset())
