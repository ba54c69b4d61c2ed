"""The windowed core attention against dense scores in fp64, with gradients; and that no score matrix is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import RankPool


def errors(length: int, window: int, block: int) -> float:
    """Largest difference of output and gradients from dense masked softmax, fp64, relative to the largest entry."""
    from megatron_sead.models.attention import banded_attention

    generator = torch.Generator().manual_seed(length)
    leaves = [
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    upstream = torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
    query, key, value = leaves
    behind = torch.arange(length)[:, None] - torch.arange(length)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill((behind < 0) | (behind >= window), -math.inf)
    expected = scores.softmax(-1) @ value
    found = banded_attention(query, key, value, window, 0.3, block)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(
    ("length", "window", "block"),
    [(40, 7, 4), (40, 7, 1024), (300, 7, 1024), (41, 7, 3), (33, 32, 8), (9, 2, 4), (16, 64, 4), (50, 8, 8)],
)
def test_bands_are_dense_attention_with_a_window(ranks: RankPool, length: int, window: int, block: int) -> None:
    assert ranks.run(errors, length, window, block)[0] < 1e-12  # fp64: summation order alone


def kept_bytes(length: int, window: int | None) -> tuple[int, int]:
    """Bytes of tensors that autograd keeps, and of the largest of them, for one head of size 8 in fp32."""
    from types import SimpleNamespace

    from megatron_sead.models.attention import TorchCoreAttention

    config = SimpleNamespace(window=lambda layer: window, attention_scale=lambda layer: 0.3)
    core = TorchCoreAttention(config, 1)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [torch.randn(length, 1, 1, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core(*leaves)
    return sum(kept.values()), max(kept.values())


@pytest.mark.parametrize("window", [None, 256])
def test_no_score_matrix_is_kept(ranks: RankPool, window: int | None) -> None:
    """At 8192 tokens one fp32 score matrix takes 268 MB."""
    short, _ = ranks.run(kept_bytes, 4096, window)[0]
    total, largest = ranks.run(kept_bytes, 8192, window)[0]
    assert largest < 4e6
    assert total < 2.2 * short  # linear in the length, not quadratic
    assert total < 40e6


def forward_only_leaves_no_graph(hf_dir: Path) -> bool:
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from tests.models.parity import Layout

    parallel = initialize_parallel(Layout().settings(), "cpu", seed=0)
    model = build_model(hf_dir, parallel, precision="bf16")[0]
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        hidden = model(tokens, torch.arange(8)[None], attention_mask=None)
    destroy_parallel(keep_world=True)
    assert hidden.dtype == torch.bfloat16
    assert hidden.shape == (1, 8, 64)
    return hidden.grad_fn is None


def test_a_forward_only_pass_keeps_no_activations(ranks: RankPool, hf_dir: Path) -> None:
    """Megatron turns gradients on around its residual add; with our norm in it, every layer would be kept."""
    assert all(ranks.run(forward_only_leaves_no_graph, hf_dir))


def products_of_a_frozen_pass(hf_dir: Path) -> set[str]:
    """Kinds of matrix products, where the core's output lies in memory batch first, as FlashAttention's does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_sead.models.attention import TorchCoreAttention
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from tests.models.parity import Layout

    kinds: set[str] = set()

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kinds.update({func.overloadpacket.__name__} & {"mm", "bmm", "addmm"})
            return func(*args, **(kwargs or {}))

    rows = TorchCoreAttention._rows
    parallel = initialize_parallel(Layout().settings(), "cpu", seed=0)
    model = build_model(hf_dir, parallel, precision="fp32")[0].requires_grad_(False).eval()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), Listening():
        patch.setattr(TorchCoreAttention, "_rows", lambda *args: torch.stack([*rows(*args).unbind(1)]).transpose(0, 1))
        model(tokens, torch.arange(8)[None], attention_mask=None)
    destroy_parallel(keep_world=True)
    return kinds


def test_a_frozen_model_multiplies_whole_matrices(ranks: RankPool, hf_dir: Path) -> None:
    """torch would take a batch of one row by row, each row a product of its own."""
    assert ranks.run(products_of_a_frozen_pass, hf_dir) == [{"mm"}] * 4
