"""What packed attention is counted as, against pairs counted one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sead.tracing.costs import _packed_attention_flops


@pytest.mark.parametrize("window", [None, 1, 3, 7, 40])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (6, 18), (1, 8)])
def test_a_query_sees_what_is_before_it_inside_the_window(queries: int, keys: int, window: int | None) -> None:
    """Queries are the last of the keys, as those of a piece are of which other ranks hold the rest."""
    if window is not None:
        keys = min(keys, queries + window - 1)  # no others are there
    sequences, heads, width = 3, 2, 4
    names = ("query", "key", "max_q", "window_size")
    func: Any = SimpleNamespace(
        _schema=SimpleNamespace(name="varlen", arguments=[SimpleNamespace(name=n) for n in names])
    )
    query, key = (torch.empty(sequences * count, heads, width) for count in (queries, keys))
    left = -1 if window is None else window - 1
    pairs = sum(
        0 <= keys - queries + q - k <= (keys if window is None else left) for q in range(queries) for k in range(keys)
    )
    found = _packed_attention_flops(func, (query, key, queries, (left, 0)))
    assert found == 2 * 2 * sequences * pairs * heads * width
