"""The mode that sees every operation of a traced rank, and tells those that keep the books."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sead.planning.rates import Rates
from megatron_sead.tracing import repeats, shadows
from megatron_sead.tracing.calls import Call
from megatron_sead.tracing.collectives import Collectives
from megatron_sead.tracing.costs import NO_TRAFFIC, Costs
from megatron_sead.tracing.errors import WrongDevice
from megatron_sead.tracing.memory import Memory, PhaseMemory

aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MASKS = (torch.bool, torch.uint8)
PACKAGE = Path(__file__).parents[1]
DEEPEST = 80  # frames that are looked at for the line of an operation


@dataclass
class Copies:
    """Between host and device."""

    number: int = 0
    bytes: int = 0
    waited_for: int = 0  # the host waits until these have arrived, and all that the device was asked for before


@dataclass
class Record:
    """What a rank has done in a part of its run."""

    costs: Costs
    memory: dict[str, PhaseMemory] = field(default_factory=dict)  # by phase
    copies: dict[tuple[str, str, str], Copies] = field(default_factory=dict)  # by phase, direction and line
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)  # by phase and line: the host waits for the device
    calls: list[Call] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)  # by phase


class Watch(TorchDispatchMode):
    """Of one traced rank; on top of a `FakeTensorMode`. Its phases nest."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.memory, self.collectives, self.rates = Memory(), Collectives(), rates
        self.fakes, self.phase = FakeTensorMode(), ""
        self.record = Record(Costs(rates))
        self.unknown: Counter[str] = Counter()  # operations whose small results could not be computed

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make every tensor of the body a fake, and watch."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", self._synchronized))
            stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda fake: self._listed(fake)))
            stack.enter_context(self.fakes)
            stack.enter_context(self)
            yield

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """What the body does, in a record of its own.

        Raises:
            WrongCollective: the body has not waited for one.
        """
        self.record = record = Record(Costs(self.rates), self.memory.begin())
        before = len(self.collectives.calls)
        yield record
        self.collectives.in_flight.require_none("the phase ends")
        record.calls = self.collectives.calls[before:]

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The body is the phase."""
        before, self.phase = self.phase, phase
        self.memory.enter(phase)
        try:
            yield
        except Exception as error:
            if not getattr(error, "__notes__", None):
                error.add_note(f"traced as rank {dist.get_rank()}, in phase {phase!r}")
            raise
        finally:
            self.phase = before
            self.memory.enter(before)

    def objects(self, name: str, group: Any, root: int | None = None) -> None:
        """Objects are sent over a group; None: all ranks."""
        self.collectives.objects(name, group or dist.group.WORLD, root, self.phase, self.line())

    def line(self) -> str:
        """Where the product asks for what runs now: file and line of this package, else of Megatron-Core."""
        node = torch._C._current_autograd_node()
        return _line_of(sys._getframe(1), "" if node is None else f"backward of {node.name()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is DEVICE_OF:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        self.record.operations[self.phase] += 1
        inputs = shadows.tensors_of(args, list(kwargs.values()))
        if func is aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
            return self._made_of_values(func, args)
        if inputs and not any(isinstance(t, FakeTensor) for t in inputs) and func.namespace != "c10d":
            with unset_fake_temporarily():  # a generator's state, of the real host
                return func(*args, **kwargs)
        self._require_there(inputs)
        if func.namespace == "c10d":
            return self.collectives.run(func, args, self.phase, self.line())
        if not _fit(func, args, inputs):
            places = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in inputs)
            raise WrongDevice(f"{self.line()}: {func}: tensors are on different devices: {places}")
        self._require_at_rest(func, args, kwargs, inputs)
        if func is aten._local_scalar_dense.default:
            self._read(args[0])
            with unset_fake_temporarily():
                return shadows.shadow_of(args[0]).item()
        if func in shadows.BY_VALUE:
            self._read(*inputs)
            return self._noted(shadows.by_value(func, args, kwargs))
        if func in INDEXED:
            self._note_indices(*args)
        if func is aten.index.Tensor:
            args = (args[0], self._places(args[1]))
            inputs = shadows.tensors_of(args)
        result = repeats.run(self.fakes, func, args, kwargs)
        self._follow(func, args, kwargs, inputs, result)
        return result

    def _require_there(self, tensors: list[torch.Tensor]) -> None:
        """
        Raises:
            RuntimeError: a tensor's memory has been given back.
        """
        for tensor in tensors:
            if tensor.untyped_storage().nbytes() == 0 and tensor.numel() > 0:
                shape = list(tensor.shape)
                raise RuntimeError(f"{self.line()}: a tensor of shape {shape} is used after its memory was freed")

    def _require_at_rest(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> None:
        """No collective that still runs may meet what the operation touches."""
        flights = self.collectives.in_flight
        if flights.works and not func.is_view and func not in NO_TRAFFIC:
            written = shadows.written(func, args, kwargs)
            flights.check(self.line(), inputs, written)

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor], result: Any) -> None:
        results = shadows.tensors_of(result)
        self._noted(result, pinned=bool(kwargs.get("pin_memory")))
        if func in COPIES:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            source = args[1] if func is aten.copy_.default else args[0]
            self._copied(source, result, result.numel() * result.element_size(), bool(waits))
        self.record.costs.count(self.phase, func, args, kwargs, [*inputs, *results], result)
        try:
            shadows.follow(func, args, kwargs, inputs, results)
        except (RuntimeError, NotImplementedError):  # no kernel on the CPU, as for attention
            self.unknown[str(func)] += 1

    def _made_of_values(self, func: Any, args: Any) -> Any:
        """``torch.tensor([...])``: what it holds is known."""
        with unset_fake_temporarily():
            values = args[0].detach().clone()
        fake = func(*args)
        shadows.set_shadow(fake, values)
        return self._noted(fake)

    def _noted(self, result: Any, *, pinned: bool = False) -> Any:
        for fake in shadows.tensors_of(result):
            if not self.memory.knows(fake):
                self.memory.made(fake, self.line(), pinned=pinned)
        return result

    def _read(self, *tensors: torch.Tensor) -> None:
        if any(map(shadows.is_cuda, tensors)):
            self.record.reads[self.phase, self.line()] += 1

    def _listed(self, fake: torch.Tensor) -> Any:
        """``tolist``, which a fake does by one read an element, and a tensor by one in all."""
        self._read(fake)
        with unset_fake_temporarily():
            return shadows.shadow_of(fake).tolist()

    def _synchronized(self, device: Any = None) -> None:
        self.record.reads[self.phase, f"{self.line()} (synchronize)"] += 1

    def _note_indices(
        self, indexed: torch.Tensor, indices: list[torch.Tensor | None], values: torch.Tensor | None = None, *_: Any
    ) -> None:
        """Indices of the host are copied to the device first; and a device waits to know where a mask is true, but
        where one value goes to all places."""
        for index in (index for index in indices if index is not None):
            if shadows.is_cuda(indexed) and not shadows.is_cuda(index):
                self._copied(index, indexed, index.numel() * index.element_size(), waits=True)
            if index.dtype in MASKS and (values is None or values.numel() > 1):
                self._read(index)

    def _places(self, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Masks as the places where they are true."""
        places: list[torch.Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in MASKS:
                places.append(index)
            else:
                places += self._noted(shadows.places_where(index))
        return places

    def _copied(self, source: torch.Tensor, result: torch.Tensor, size: int, waits: bool) -> None:
        to_host = shadows.is_cuda(source)
        if to_host == shadows.is_cuda(result):
            return
        copies = self.record.copies.setdefault(
            (self.phase, "to host" if to_host else "to device", self.line()), Copies()
        )
        copies.number += 1
        copies.bytes += size
        copies.waited_for += waits
        self.record.costs.copied(self.phase, size, pinned=self.memory.is_pinned(result if to_host else source))


def _fit(func: Any, args: Any, inputs: list[torch.Tensor]) -> bool:
    """Are tensors where an operator takes them? FakeTensor asks this of some operators only. Numbers, as tensors
    without dimensions, may lie on the host."""
    if _on_one_device(inputs) or func in COPIES:
        return True
    if func in INDEXED and shadows.is_cuda(args[0]):  # which takes indices from the host too
        return _on_one_device([args[0], *shadows.tensors_of(args[2:])])
    if func._schema.name.startswith("aten::_foreach_"):  # the first of each list, the second, ...
        lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor)]
        return all(map(_on_one_device, zip(*lists, strict=False))) or func is aten._foreach_copy_.default
    return False


def _on_one_device(tensors: Iterable[torch.Tensor]) -> bool:
    return len({shadows.is_cuda(tensor) for tensor in tensors if tensor.dim() > 0}) < 2


def _line_of(frame: Any, node: str) -> str:
    other = None
    for _ in range(DEEPEST):
        if frame is None:
            break
        place, is_ours = _place_of(frame.f_code)
        if is_ours:
            return f"{place}:{frame.f_lineno} ({node})" if node else f"{place}:{frame.f_lineno}"
        if place and other is None:
            other = f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "elsewhere"


@functools.cache
def _place_of(code: CodeType) -> tuple[str, bool]:
    """A function's file, as it is told, and is it of this package? Nothing of others than it and Megatron-Core."""
    name = code.co_filename
    if name.startswith(str(PACKAGE)) and "/tracing/" not in name:
        return str(Path(name).relative_to(PACKAGE)), True
    return name[name.index("megatron/core/") :] if "/megatron/core/" in name else "", False
