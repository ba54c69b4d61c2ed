"""FlashAttention over packed sequences, on a GPU: causal, with windows, whose hidden keys it skips; no masks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Shapes: s sequence, b batch, t tokens of all packed sequences, n query heads, g key/value heads, d head dimension


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
    length, batch = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    context = packed_attention(query, key, value, (starts, starts), (length, length), window, scale)
    return context.unflatten(0, (batch, length)).transpose(0, 1)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each sequence to itself.

    Args:
        query: [t, n, d].
        key: [k, g, d], of which each serves n/g queries; so is value.
        starts: [sequences + 1] int32, cumulative lengths from 0, of queries and of keys: what is beyond them is not
            written. Queries are the last of their sequence's keys: masks and windows are aligned to the lower right.
        longest: most queries of a sequence, and most keys.
        window: how many tokens are seen, the current one included; None: all before it.

    Returns:
        [t, n, d].
    """
    attention, parameters = _packed_attention()
    assert attention is not None  # `serves` said so
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    if not options and query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    seen = -1 if window is None else window - 1
    context: torch.Tensor = attention(
        query, key, value, *starts, *longest, scale=scale, window_size=(seen, 0), **options
    )
    return context


@cache
def _packed_attention() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """torch's, and its parameters; none where it has no windows."""
    try:
        attention = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None, frozenset()
    parameters = frozenset(inspect.signature(attention).parameters)
    return (attention, parameters) if {"window_size", "scale"} <= parameters else (None, frozenset())
