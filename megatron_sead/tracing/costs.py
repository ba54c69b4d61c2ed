"""Floating-point operations and bytes by phase, and the seconds that they take on a machine of given rates."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from megatron_sead.planning.rates import Rates
from megatron_sead.tracing.collectives import GATHERS, SCATTERS, Call
from megatron_sead.tracing.shadows import UNWRITTEN, is_cuda

aten = torch.ops.aten
PRODUCTS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}  # where the factors are
NO_TRAFFIC = UNWRITTEN | {aten._unsafe_view.default, aten.detach.default}


class Costs:
    """Of one rank, by phase."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()  # of the GPU's memory
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of its kernels and copies; collectives aside

    def count(
        self, phase: str, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], result: Any
    ) -> None:
        """An operation has run: on the GPU, if `tensors`, which it has read and made, are there."""
        if func.is_view or func in NO_TRAFFIC:
            return
        touched = [t for t in tensors if is_cuda(t)]
        if not touched:
            return
        moved = sum(t.numel() * t.element_size() for t in touched)
        flops = _flops(func, args, kwargs, result)
        fast = touched[0].element_size() <= 2
        rate = 1e12 * (self.rates.bf16_tflops if fast else self.rates.fp32_tflops)
        self.flops[phase] += flops
        self.bytes[phase] += moved
        least = self.rates.kernel_microseconds / 1e6
        self.seconds[phase] += max(flops / rate, moved / (self.rates.memory_gb * 1e9), least)

    def copied(self, phase: str, size: int, *, pinned: bool) -> None:
        """So many bytes went between host and GPU."""
        rate = self.rates.host_link_gb if pinned else self.rates.pageable_host_link_gb
        self.seconds[phase] += size / (rate * 1e9)

    def collective_seconds(self, call: Call) -> float:
        """Of rings, which move (n - 1) / n of the whole through each rank, twice for an all-reduce."""
        rates, n = self.rates, len(call.ranks)
        within = len({rank // rates.gpus_per_node for rank in call.ranks}) == 1
        rate = 1e9 * (rates.node_link_gb if within else rates.network_gb)
        share = {"allreduce_": 2 * (n - 1) / n, "allreduce_coalesced_": 2 * (n - 1) / n}.get(call.name, 1.0)
        if call.name in GATHERS | SCATTERS:
            share = (n - 1) / n
        return call.bytes * share / rate + rates.collective_microseconds / 1e6


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Causal attention and windows are counted as the kernels do them: what no query sees is skipped."""
    if func.namespace == "torch_attn":
        return _packed_attention_flops(func, args)
    packet = func._overloadpacket
    if packet in PRODUCTS:  # of any overload; torch's counters do not know those with a type of the result
        left, right = (args[place] for place in PRODUCTS[packet])
        return 2 * left.numel() * int(right.shape[-1])
    counter = flop_registry.get(packet)
    if counter is None:
        return 0
    count = int(counter(*args, **kwargs, out_val=result))
    if "scaled_dot_product" in func._schema.name and _is_causal(func, args, kwargs):
        count = (count + 1) // 2
    return count


def _is_causal(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("is_causal"))


def _packed_attention_flops(func: Any, args: Any) -> int:
    """Of `varlen_attn` and its backward pass: two products a pair of a query and a key that it sees, five backward.
    Queries are the last of their sequence's keys."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    query, longest = named["query"], named["max_q"]
    left, right = named.get("window_size") or (-1, -1)
    sequences = max(1, math.ceil(len(query) / longest))
    keys = max(longest, len(named["key"]) // sequences)
    pairs = longest * keys
    if right == 0 or named.get("is_causal"):
        width, before = keys if left < 0 else min(left + 1, keys), keys - longest
        growing = max(0, min(width - before, longest))  # queries that see all before them
        pairs = growing * before + growing * (growing + 1) // 2 + (longest - growing) * width
    products = 5 if "backward" in func._schema.name else 2
    return int(2 * products * sequences * pairs * query.shape[-2] * query.shape[-1])
