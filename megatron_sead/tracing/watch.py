"""The mode that sees every operation of a traced rank, and tells those that keep the books."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sead.tracing import shadows
from megatron_sead.tracing.collectives import Collectives
from megatron_sead.tracing.costs import Costs, Rates
from megatron_sead.tracing.memory import Memory

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
PACKAGE = Path(__file__).parents[1]
DEEPEST = 80  # frames that are looked at for the line of an operation


@dataclass
class Copies:
    """Between host and device."""

    number: int = 0
    bytes: int = 0
    waited_for: int = 0  # the host waits until these have arrived, and all that the device was asked for before


class Watch(TorchDispatchMode):
    """Of one traced rank; on top of a `FakeTensorMode`. Its phases nest."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.memory, self.collectives, self.costs = Memory(), Collectives(), Costs(rates)
        self.phase = ""
        self.operations: Counter[str] = Counter()  # by phase
        self.copies: dict[tuple[str, str, str], Copies] = {}  # by phase, direction and line
        self.reads: Counter[tuple[str, str]] = Counter()  # by phase and line: the host waits for the device
        self.unknown: Counter[str] = Counter()  # operations whose small results could not be computed

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make every tensor of the body a fake, and watch."""
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(self)
            yield

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The body is the phase."""
        before, self.phase = self.phase, phase
        self.memory.enter(phase)
        try:
            yield
        finally:
            self.phase = before
            self.memory.enter(before)

    def objects(self, name: str, group: Any) -> None:
        """Objects are sent over a group; None: all ranks."""
        self.collectives.objects(name, group or dist.group.WORLD, self.phase, self.line())

    def line(self) -> str:
        """Where the product asks for what runs now: file and line of this package, else of Megatron-Core."""
        node = torch._C._current_autograd_node()
        return _line_of(sys._getframe(1), "" if node is None else f"backward of {node.name()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        self.operations[self.phase] += 1
        inputs = shadows.tensors_of(args, list(kwargs.values()))
        if func is aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
            return self._made_of_values(func, args)
        if inputs and not any(isinstance(t, FakeTensor) for t in inputs) and func.namespace != "c10d":
            with unset_fake_temporarily():  # a generator's state, of the real host
                return func(*args, **kwargs)
        for tensor in inputs:
            self.memory.require_there(tensor)
        if func.namespace == "c10d":
            return self.collectives.run(func, args, kwargs, self.phase, self.line())
        if func is aten._local_scalar_dense.default:
            self._read(args[0])
            with unset_fake_temporarily():
                return shadows.shadow_of(args[0]).item()
        if func in shadows.BY_VALUE:
            self._read(*inputs)
            return self._noted(shadows.by_value(func, args, kwargs))
        if func is aten.index.Tensor:
            args = (args[0], self._indices(args[1]))
            inputs = shadows.tensors_of(args)
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, inputs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor], result: Any) -> None:
        results = shadows.tensors_of(result)
        self._noted(result, pinned=bool(kwargs.get("pin_memory")))
        if func in COPIES:
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            self._copied(args[1] if func is aten.copy_.default else args[0], result, waits)
        self.costs.count(self.phase, func, args, kwargs, [*inputs, *results], result)
        try:
            shadows.follow(func, args, kwargs, inputs, results)
        except (RuntimeError, NotImplementedError):  # no kernel on the CPU, as for attention
            self.unknown[str(func)] += 1
            for fake in filter(shadows.is_small, results):
                shadows.set_shadow(fake, shadows.unknown(fake))

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
            self.reads[self.phase, self.line()] += 1

    def _indices(self, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Masks as the places where they are true, which is what a device does too, and waits for."""
        places: list[torch.Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                places.append(index)
            else:
                self._read(index)
                places += self._noted(shadows.places_where(index))
        return places

    def _copied(self, source: torch.Tensor, result: torch.Tensor, waits: bool) -> None:
        to_host = shadows.is_cuda(source)
        if to_host == shadows.is_cuda(result):
            return
        size, line = result.numel() * result.element_size(), self.line()
        copies = self.copies.setdefault((self.phase, "to host" if to_host else "to device", line), Copies())
        copies.number += 1
        copies.bytes += size
        copies.waited_for += waits
        self.costs.copied(self.phase, size, pinned=self.memory.is_pinned(result if to_host else source))


def _line_of(frame: Any, node: str) -> str:
    other = ""
    for _ in range(DEEPEST):
        if frame is None:
            break
        name = frame.f_code.co_filename
        if name.startswith(str(PACKAGE)) and "/tracing/" not in name:
            line = f"{Path(name).relative_to(PACKAGE)}:{frame.f_lineno}"
            return f"{line} ({node})" if node else line
        if not other and "/megatron/core/" in name:
            other = f"{name[name.index('megatron/core/') :]}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "elsewhere"
