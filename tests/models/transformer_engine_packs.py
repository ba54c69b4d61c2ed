"""A program: a packed row through Megatron's wrapper of Transformer Engine, whose `DotProductAttention` is a stand-in.

Transformer Engine needs a GPU. The stand-in takes the arguments that its documentation names for the packed (THD)
form, checks them, and computes dense attention by them; all else is what a run has. Prints ``packed as alone``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import math
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Anything(type):
    """A class for whatever name is asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (torch.nn.Module,), {})


class DotProductAttention(torch.nn.Module):
    """Transformer Engine's, causal: rows [s, b, n, d], or packed [t, n, d] with cumulative lengths."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int,
        attn_mask_type: str,
        softmax_scale: float,
        window_size: tuple[int, int] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale, self.window = softmax_scale, window_size
        assert attn_mask_type == "causal"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        attn_mask_type: str,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: None = None,
        cu_seqlens_kv_padded: None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        pad_between_seqs: None = None,
    ) -> torch.Tensor:
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return torch.stack([self.dense(*(x[:, b] for x in (query, key, value))) for b in range(query.shape[1])], 1)
        assert (qkv_format, attn_mask_type, query.dim()) == ("thd", "padding_causal", 3)
        assert cu_seqlens_q is not None
        assert cu_seqlens_q is cu_seqlens_kv
        assert cu_seqlens_q.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(query)
        assert max_seqlen_q == max_seqlen_kv == max(lengths)
        sequences = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self.dense(*sequence) for sequence in sequences])

    def dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[s, n, d] -> [s, n * d]"""
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        behind = torch.arange(len(query))[:, None] - torch.arange(len(query))
        seen = math.inf if self.window is None else self.window[0]
        scores = torch.einsum("qnd,knd->nqk", query, key) * self.scale
        weights = scores.masked_fill((behind < 0) | (behind > seen), -math.inf).softmax(-1)
        return torch.einsum("nqk,knd->qnd", weights, value).flatten(1)


class Module(types.ModuleType):
    __version__ = "2.10.0"
    DotProductAttention = DotProductAttention

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (torch.nn.Module,), {})


class TransformerEngine(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of that package, but for those that a model calls while it is built."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != "transformer_engine" or name.endswith(("cpu_offload", "optimizers")):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Module:
        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def main(hf_dir: Path) -> None:
    from megatron_sead.config.parallel import ParallelSettings
    from megatron_sead.models import layers
    from megatron_sead.models.builder import build_model
    from megatron_sead.models.packed import PackedSequences
    from megatron_sead.parallel.groups import initialize_parallel

    # The core alone is Transformer Engine's here: its linear layers would have to be stood in for too
    core, torch_parts = layers._transformer_engine_parts()["core_attention"], layers._torch_parts()
    layers._torch_parts = lambda: torch_parts | {"core_attention": core}
    parallel = initialize_parallel(ParallelSettings(), "cpu", seed=0)
    (model,) = build_model(hf_dir, parallel, precision="fp32", recompute_granularity="selective")
    assert isinstance(model.decoder.layers[0].self_attention.core_attention, DotProductAttention)
    lengths = (7, 30, 1, 12)
    tokens = torch.randint(0, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = PackedSequences.of(starts, positions, lengths)
    found = model(tokens, positions[None], attention_mask=None, packed_seq_params=packed)[0].split(lengths)
    for sequence, hidden in zip(tokens.split(lengths, dim=1), found, strict=True):
        alone = model(sequence, torch.arange(sequence.shape[1])[None], attention_mask=None)[0]
        torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)
    print("packed as alone")


if __name__ == "__main__":
    sys.meta_path.insert(0, TransformerEngine())
    from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

    adapt_to_cpu()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        main(Path(sys.argv[1]))
