"""What ranks send each other: sizes, types and devices checked, for nothing here goes anywhere; recorded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_sead.parallel.context import ParallelContext
from megatron_sead.tracing.calls import MESSAGES, Call
from megatron_sead.tracing.errors import WrongCollective
from megatron_sead.tracing.in_flight import InFlight
from megatron_sead.tracing.shadows import is_small, set_shadow, shadow_of, tensors_of, unknown

GATHERS = {"_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "allgather_coalesced_"}
SCATTERS = {"_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"}
EXCHANGES = {"alltoall_base_", "alltoall_"}
TWO_SIDED = GATHERS | SCATTERS | EXCHANGES | {"gather_", "scatter_"}  # others work in place, or have no result
ROOTED = {"broadcast_", "reduce_", "gather_", "scatter_"} | MESSAGES
REDUCTIONS = {"allreduce_", "allreduce_coalesced_", "reduce_"} | SCATTERS
NO_TENSOR = {"barrier", "monitored_barrier_"}


class Collectives:
    """Of one rank."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.in_flight = InFlight()
        self.op = "SUM"  # of the reduction to come; Megatron-Core's own are sums
        self._labels: dict[str, str] = {}
        self._host_groups: set[str] = set()

    def name_groups(self, parallel: ParallelContext) -> None:
        """Tell groups of the same ranks apart by what they are for."""
        megatron = {
            n: getattr(parallel.megatron, n, None) for n in ("mp", "tp_ep_pp", "intra_dist_opt", "embd", "pos_embd")
        }
        ours = {name: getattr(parallel, name) for name in ("dp_with_cp", "dp", "cp", "pp", "tp", "control")}
        for label, group in {"world": dist.group.WORLD, **megatron, **ours}.items():
            if group is not None and not isinstance(group, list):
                self._labels[group.group_name] = label
        self._host_groups = {parallel.control.group_name}

    def run(self, func: Any, args: Any, phase: str, line: str) -> Any:
        """Check and record a call of one of torch's c10d operators, and return what it returns."""
        name, group = func._overloadpacket.__name__, group_of(args)
        written, read = _written_and_read(name, group, args)
        tensors = [*written, *read]
        self._check_places(name, group, tensors, line)
        _check_sizes(name, written, read, args, group.size(), line)
        self.in_flight.check(line, read, written, group.group_name)
        op, self.op = (self.op, "SUM") if name in REDUCTIONS else ("", self.op)
        self.calls.append(self._call(name, group, args, written, read, op, phase, line))
        _values(name, group, written, read, op == "SUM")
        if name == "monitored_barrier_":
            return None
        work = self.in_flight.begin(f"{name} at {line}", group.group_name, read, written).boxed()
        return (args[0], work) if len(func._schema.returns) > 1 else work

    def objects(self, name: str, group: Any, root: int | None, phase: str, line: str) -> None:
        """Record a collective of Python objects."""
        ranks = tuple(dist.get_process_group_ranks(group))
        label = self._labels.get(group.group_name, "other")
        self.calls.append(Call(name, label, ranks, (), (), root, 0, phase, line))

    def _call(
        self, name: str, group: Any, args: Any, written: list[Any], read: list[Any], op: str, phase: str, line: str
    ) -> Call:
        ranks = tuple(dist.get_process_group_ranks(group))
        moved = _moved(name, written, read)
        sent, received = _exchanged(name, args, group.size()) if name in EXCHANGES else ((), ())
        return Call(
            name,
            self._labels.get(group.group_name, "other"),
            ranks,
            () if name in EXCHANGES else tuple(t.numel() for t in moved),
            tuple(str(t.dtype).removeprefix("torch.") for t in moved),
            next((a for a in args if type(a) is int), None) if name in ROOTED else None,
            sum(t.numel() * t.element_size() for t in moved),
            phase,
            line,
            op,
            sent,
            received,
        )

    def _check_places(self, name: str, group: Any, tensors: list[torch.Tensor], line: str) -> None:
        expected = "cpu" if group.group_name in self._host_groups else "cuda"
        for tensor in tensors:
            if tensor.device.type != expected:
                raise WrongCollective(
                    f"{line}: {name}: a tensor on {tensor.device}: its group takes those on {expected}"
                )
            if not tensor.is_contiguous():
                raise WrongCollective(f"{line}: {name}: a tensor {list(tensor.shape)} that is not contiguous")


def group_of(args: Any) -> Any:
    """The process group among the arguments of one of torch's c10d operators."""
    boxes = (a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    return dist.ProcessGroup.unbox(next(boxes))


def moved_by(name: str, group: Any, args: Any) -> list[torch.Tensor]:
    """What a collective moves: of a gather or scatter, what holds all ranks' parts."""
    return _moved(name, *_written_and_read(name, group, args))


def _moved(name: str, written: list[torch.Tensor], read: list[torch.Tensor]) -> list[torch.Tensor]:
    return written if name in GATHERS | {"scatter_"} else read or written


def _written_and_read(name: str, group: Any, args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if name in NO_TENSOR:
        return [], []
    tensors = tensors_of(args[0])
    if name in TWO_SIDED:
        return tensors, tensors_of(args[1])
    if name == "send":
        return [], tensors
    if name in MESSAGES:
        return tensors, []
    if name == "broadcast_":
        return ([], tensors) if group.rank() == args[2] else (tensors, [])
    return tensors, tensors


def _check_sizes(
    name: str, written: list[torch.Tensor], read: list[torch.Tensor], args: Any, ranks: int, line: str
) -> None:
    both = written, read
    if written and read and len({t.dtype for t in (*written, *read)}) > 1:
        raise WrongCollective(f"{line}: {name}: tensors of types {sorted({str(t.dtype) for t in (*written, *read)})}")
    if name in EXCHANGES:
        _check_splits(name, args, ranks, line)
    if name not in TWO_SIDED - EXCHANGES:
        return
    large, small = both if name in GATHERS | {"gather_"} else (read, written)
    if not large:  # of a gather or scatter, away from its root
        return
    pieces = isinstance(args[0 if name in GATHERS | {"gather_"} else 1], list) and "coalesced" not in name
    uneven = pieces and len({t.numel() for t in (*large, *small)}) > 1
    if uneven or sum(t.numel() for t in large) != ranks * sum(t.numel() for t in small):
        shapes = [list(t.shape) for t in large[:ranks]], [list(t.shape) for t in small[:2]]
        raise WrongCollective(f"{line}: {name} over {ranks} ranks: {shapes[0]} is not {ranks} times {shapes[1]}")


def _exchanged(name: str, args: Any, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements to and from each rank."""
    if name == "alltoall_":
        return tuple(t.numel() for t in args[1]), tuple(t.numel() for t in args[0])

    def pieces(tensor: torch.Tensor, splits: list[int]) -> tuple[int, ...]:
        row = tensor.numel() // max(1, len(tensor))
        return tuple(row * split for split in splits or [len(tensor) // ranks] * ranks)

    return pieces(args[1], args[4]), pieces(args[0], args[3])


def _check_splits(name: str, args: Any, ranks: int, line: str) -> None:
    sides = (args[1], args[0])
    for tensor, elements in zip(sides, _exchanged(name, args, ranks), strict=True):
        whole = sum(t.numel() for t in tensors_of(tensor))
        if len(elements) != ranks or sum(elements) != whole:
            raise WrongCollective(f"{line}: {name} over {ranks} ranks: {list(elements)} elements of {whole}")


def _values(name: str, group: Any, written: list[torch.Tensor], read: list[torch.Tensor], sums: bool) -> None:
    """All ranks hold what this one holds."""
    with unset_fake_temporarily():
        if name in {"allreduce_", "allreduce_coalesced_"}:
            for tensor in filter(is_small, written if sums else ()):
                shadow_of(tensor).mul_(group.size())
        elif name in GATHERS | {"gather_"} and len(read) == 1 and all(map(is_small, (*written, *read))):
            part = shadow_of(read[0]).flatten()
            for whole in written:
                set_shadow(whole, part.repeat(whole.numel() // part.numel() if part.numel() else 0).view(whole.shape))
        elif name == "broadcast_":
            for tensor in filter(is_small, written):
                shadow_of(tensor).fill_(1)
        elif name != "reduce_":
            for tensor in filter(is_small, written):
                shadow_of(tensor).copy_(unknown(tensor))
