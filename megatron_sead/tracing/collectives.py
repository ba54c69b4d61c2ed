"""What ranks send each other: sizes and devices checked, for nothing here goes anywhere; recorded, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_sead.parallel.context import ParallelContext
from megatron_sead.tracing.shadows import is_small, set_shadow, shadow_of, tensors_of, unknown

GATHERS = {"_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"}
SCATTERS = {"_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"}
MESSAGES = {"send", "recv_"}


@dataclass(frozen=True)
class Call:
    """One collective, or one end of a message, as a rank sees it."""

    name: str  # of torch's operator
    group: str  # tp, pp, ...
    ranks: tuple[int, ...]
    elements: tuple[int, ...]  # of each tensor
    dtypes: tuple[str, ...]
    root: int | None  # of a broadcast; the other end of a message; within the group
    bytes: int  # of the whole: all ranks' parts of a gather
    phase: str
    line: str

    def same(self, other: Call) -> bool:
        """Would they meet?"""
        fields = ("name", "ranks", "elements", "dtypes", "root")
        return all(getattr(self, name) == getattr(other, name) for name in fields)

    def __str__(self) -> str:
        return f"{self.name} of {list(self.elements)} {'/'.join(sorted(set(self.dtypes)))} at {self.line}"


class WrongCollective(RuntimeError):
    """A collective that ranks of a real run could not take part in."""


class Collectives:
    """Of one rank."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.sums = True  # does the all-reduce to come add up?
        self._labels: dict[str, str] = {}
        self._host_groups: set[str] = set()

    def name_groups(self, parallel: ParallelContext) -> None:
        """Tell groups of the same ranks apart by what they are for."""
        megatron = {
            n: getattr(parallel.megatron, n, None) for n in ("mp", "tp_ep_pp", "intra_dist_opt", "embd", "pos_embd")
        }
        ours = {name: getattr(parallel, name) for name in ("dp_with_cp", "dp", "pp", "tp", "control")}
        for label, group in {"world": dist.group.WORLD, **megatron, **ours}.items():
            if group is not None and not isinstance(group, list):
                self._labels[group.group_name] = label
        self._host_groups = {parallel.control.group_name}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], phase: str, line: str) -> Any:
        """Check and record a call of one of torch's c10d operators, and return its work."""
        name = func._overloadpacket.__name__
        group = _group(args)
        tensors = tensors_of(args)
        if name != "barrier":
            self._check_places(name, group, tensors, line)
        large, small = _sides(name, args)
        _check_sizes(name, large, small, group.size(), line)
        moved = large or tensors
        self.calls.append(
            Call(
                name,
                self._labels.get(group.group_name, "other"),
                tuple(dist.get_process_group_ranks(group)),
                tuple(t.numel() for t in moved) if name != "barrier" else (),
                tuple(str(t.dtype).removeprefix("torch.") for t in moved),
                next((a for a in args if isinstance(a, int)), None) if name in MESSAGES | {"broadcast_"} else None,
                sum(t.numel() * t.element_size() for t in moved) if name != "barrier" else 0,
                phase,
                line,
            )
        )
        work = _without_meta_kernel(func, name, args, kwargs) if name.endswith("coalesced_") else func(*args, **kwargs)
        _values(name, group, args, large, small, self.sums)
        return work

    def objects(self, name: str, group: Any, phase: str, line: str) -> None:
        """Record a collective of Python objects."""
        ranks = tuple(dist.get_process_group_ranks(group))
        label = self._labels.get(group.group_name, "other")
        self.calls.append(Call(name, label, ranks, (), (), None, 0, phase, line))

    def _check_places(self, name: str, group: Any, tensors: list[torch.Tensor], line: str) -> None:
        expected = "cpu" if group.group_name in self._host_groups else "cuda"
        for tensor in tensors:
            if tensor.device.type != expected:
                raise WrongCollective(
                    f"{line}: {name}: a tensor on {tensor.device}: its group takes those on {expected}"
                )
            if not tensor.is_contiguous():
                raise WrongCollective(f"{line}: {name}: a tensor {list(tensor.shape)} that is not contiguous")


def disagreements(by_rank: dict[int, list[Call]]) -> list[str]:
    """Where traced ranks would not meet: a line each."""
    found = []
    ranks = sorted(by_rank)
    for number, first in enumerate(ranks):
        for second in ranks[number + 1 :]:
            found += _between(first, by_rank[first], second, by_rank[second])
    return found


def _between(first: int, theirs: list[Call], second: int, others: list[Call]) -> list[str]:
    lines = []
    groups = {(c.group, c.ranks) for c in theirs if {first, second} <= set(c.ranks)}
    groups |= {(c.group, c.ranks) for c in others if {first, second} <= set(c.ranks)}
    for label, ranks in sorted(groups):
        a, b = ([c for c in calls if (c.group, c.ranks) == (label, ranks)] for calls in (theirs, others))
        mine, other = ([c for c in calls if c.name not in MESSAGES] for calls in (a, b))
        lines += _first_difference(f"group {label}, ranks {first} and {second}", mine, other, Call.same)
        for sender, sends, receiver, receives in ((first, a, second, b), (second, b, first, a)):
            out = [c for c in sends if c.name == "send" and ranks[c.root or 0] == receiver]
            back = [c for c in receives if c.name == "recv_" and ranks[c.root or 0] == sender]
            what = f"group {label}, from rank {sender} to rank {receiver}"
            lines += _first_difference(what, out, back, lambda x, y: (x.elements, x.dtypes) == (y.elements, y.dtypes))
    return lines


def _first_difference(what: str, a: list[Call], b: list[Call], same: Callable[[Call, Call], bool]) -> list[str]:
    for number, (x, y) in enumerate(zip(a, b, strict=False), 1):
        if not same(x, y):
            return [f"{what}: call {number} is {x}, and {y}"]
    if len(a) != len(b):
        longer = a if len(a) > len(b) else b
        return [
            f"{what}: {len(a)} calls against {len(b)}; the first without a partner is {longer[min(len(a), len(b))]}"
        ]
    return []


def _group(args: Any) -> Any:
    boxes = (a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    return dist.ProcessGroup.unbox(next(boxes))


def _sides(name: str, args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What holds all ranks' parts, and what holds one; nothing of other collectives."""
    if name not in GATHERS | SCATTERS:
        return [], []
    sides = [tensors_of(side) for side in args[:2]]
    return (sides[0], sides[1]) if name in GATHERS else (sides[1], sides[0])


def _check_sizes(name: str, large: list[torch.Tensor], small: list[torch.Tensor], ranks: int, line: str) -> None:
    whole = sum(t.numel() for t in large)
    if large and whole != ranks * sum(t.numel() for t in small):
        shapes = [list(t.shape) for t in large[:2]], [list(t.shape) for t in small[:2]]
        raise WrongCollective(f"{line}: {name} over {ranks} ranks: {shapes[0]} is not {ranks} times {shapes[1]}")
    if len({t.dtype for t in (*large, *small)}) > 1:
        raise WrongCollective(f"{line}: {name}: tensors of types {sorted({str(t.dtype) for t in (*large, *small)})}")


def _without_meta_kernel(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """The work of a coalesced operation, which knows no fakes, comes from one over tensors of one element a rank."""
    ranks = _group(args).size()

    def tiny(position: int, value: Any) -> Any:
        if not (isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor)):
            return value
        is_large = (position == 0) == (name in GATHERS) and name in GATHERS | SCATTERS
        return [torch.zeros(ranks if is_large else 1) for _ in value]

    with unset_fake_temporarily():
        return func(*(tiny(position, value) for position, value in enumerate(args)), **kwargs)


def _values(name: str, group: Any, args: Any, large: list[torch.Tensor], small: list[torch.Tensor], sums: bool) -> None:
    """All ranks hold what this one holds."""
    tensors = [t for t in tensors_of(args) if is_small(t)]
    ranks = group.size()
    with unset_fake_temporarily():
        if name == "allreduce_":
            for tensor in tensors if sums else ():
                shadow_of(tensor).mul_(ranks)
        elif name in GATHERS and len(small) == 1 and all(map(is_small, (*large, *small))):
            part = shadow_of(small[0]).flatten()
            for whole in large:
                set_shadow(whole, part.repeat(whole.numel() // part.numel() if part.numel() else 0).view(whole.shape))
        elif name in SCATTERS:
            for tensor in filter(is_small, small):
                shadow_of(tensor).copy_(unknown(tensor))
        elif name == "broadcast_" and group.rank() != args[2]:
            for tensor in tensors:
                shadow_of(tensor).fill_(1)
