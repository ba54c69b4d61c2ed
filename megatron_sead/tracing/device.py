"""A CUDA device that is there in name only, for a build of torch without CUDA.

It changes torch for the rest of the process: a trace is a process of its own. That is why it is applied by an explicit
call, and refuses where Megatron-Core has been adapted to the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from megatron_sead.distillation.kernels.compiled import COMPILERS
from megatron_sead.errors import UserError
from megatron_sead.parallel.cpu_adaptor import is_adapted
from megatron_sead.parallel.idle_streams import IdleEvent, IdleStream, always

SOURCE = Path(__file__).with_name("device_guard.cpp")
GPU = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
)
GENERATOR_BYTES = 16  # of a CUDA generator's state


def compiler() -> str | None:
    """The C++ compiler, as the environment's CXX or by its usual names; None where there is none."""
    named = os.environ.get("CXX")
    if named:
        return named if shutil.which(shlex.split(named)[0]) else None
    return next(filter(shutil.which, COMPILERS), None)


@functools.cache
def install_device() -> None:
    """Let this process make fake cuda tensors, and differentiate through them. Idempotent.

    Raises:
        UserError: there is no C++ compiler, or it fails; or this torch has CUDA.
    """
    assert not is_adapted(), "this process runs Megatron-Core on the CPU"
    if torch.backends.cuda.is_built():
        raise UserError(
            f"a trace needs a torch without CUDA, not {torch.__version__}: install its +cpu build in an environment of "
            "its own; it needs no GPU"
        )
    if _compiled_guard().install() != 1:
        raise RuntimeError("torch does not see the fake CUDA device")
    torch.autograd.set_multithreading_enabled(False)  # the device's own thread would outlive Python
    _answer_cuda_names()
    _let_fake_tensors_be_moved()


def _compiled_guard() -> ctypes.CDLL:
    """Each process compiles its own, in three seconds, and leaves no file: one that lies somewhere may be another's."""
    program = compiler()
    if program is None:
        raise UserError(
            f"a trace needs a C++ compiler, and none of {', '.join(COMPILERS)} is installed (CXX names another)"
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "device-guard.so")
        _compile(program, library)
        return ctypes.CDLL(str(library))  # stays mapped when its file is gone


def _compile(program: str, into: Path) -> None:
    root = Path(torch.__file__).parent
    command = [*shlex.split(program), "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(SOURCE)]
    command += ["-o", str(into), f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"a trace needs a C++ compiler that knows C++20; {program}: {result.stderr.strip()[:200]}")


# --- torch.cuda -------------------------------------------------------------------------------------------------------


class Stream(IdleStream):
    """Of the fake GPU: nothing runs there, so there is nothing to wait for."""

    device = torch.device("cuda", 0)
    cuda_stream = 0


def _generator_state(device: Any = None) -> torch.Tensor:
    with unset_fake_temporarily():
        return torch.zeros(GENERATOR_BYTES, dtype=torch.uint8)


def _answer_cuda_names() -> None:
    stream, memory = Stream(), (GPU.total_memory, GPU.total_memory)
    random = {
        "get_rng_state": _generator_state,
        "set_rng_state": always(None),
        "manual_seed": always(None),
        "manual_seed_all": always(None),
    }
    answers: dict[str, Any] = random | {
        "is_available": always(True),
        "is_initialized": always(True),
        "device_count": always(1024),  # whichever local rank is traced
        "current_device": always(0),
        "set_device": always(None),
        "synchronize": always(None),
        "empty_cache": always(None),
        "ipc_collect": always(None),
        "get_device_capability": always((GPU.major, GPU.minor)),
        "get_device_properties": always(GPU),
        "get_device_name": always(GPU.name),
        "is_bf16_supported": always(True),
        "is_current_stream_capturing": always(False),
        "Stream": Stream,
        "Event": IdleEvent,
        "stream": always(nullcontext()),
        "current_stream": always(stream),
        "default_stream": always(stream),
        "memory_stats": always({}),
        "reset_peak_memory_stats": always(None),
        "mem_get_info": always(memory),
        "_lazy_init": always(None),
        "default_generators": (SimpleNamespace(set_state=always(None), get_state=_generator_state),),
        "_exchange_device": always(0),
        "_maybe_exchange_device": always(0),
    }
    answers |= {f"{kind}memory_{what}": always(0) for kind in ("", "max_") for what in ("allocated", "reserved")}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name, answer in random.items():
        setattr(torch.cuda.random, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, always(None))
    torch.cuda.nvtx.range = always(nullcontext())


# --- FakeTensor: what it does not know of devices ---------------------------------------------------------------------


def _let_fake_tensors_be_moved() -> None:
    fake, mode, module, internals = (
        cast(Any, owner) for owner in (FakeTensor, fake_tensor.FakeTensorMode, torch.nn.Module, fake_tensor)
    )
    # The mode must not touch the device, whatever is_available() says
    mode.avoid_device_init = property(lambda self: True)
    internals.init_gpu_context = always(None)
    # It keeps its device in Python, which torch's setter of `data` does not know of
    data: Any = torch.Tensor.data

    def set_data(self: Any, value: torch.Tensor) -> None:
        data.__set__(self, value)
        if isinstance(value, FakeTensor):
            self.fake_device = value.fake_device
        vars(self).pop("shadow", None)
        if hasattr(value, "shadow"):
            self.shadow = value.shadow

    fake.data = property(lambda self: data.__get__(self), set_data)
    fake.pin_memory = _pinned
    fake.__deepcopy__ = _deeply_copied
    module._apply = _apply_in_place
    from torch.optim.optimizer import _foreach_supported_types

    _foreach_supported_types.append(FakeTensor)  # a fake stands for a plain tensor: optimizers take it in lists
    torch.tensor = functools.wraps(torch.tensor)(functools.partial(_tensor, torch.tensor))


def _pinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    return torch.empty_like(self, pin_memory=True).copy_(self)


def _deeply_copied(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """torch would copy the storage, which is none."""
    memo[id(self)] = copied = self.detach().clone().requires_grad_(self.requires_grad)
    return copied


def _apply_in_place(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """``Module.to`` and the like. torch would swap fakes, which fails where one has a weak reference."""
    for child in self.children():
        _apply_in_place(child, fn)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                changed = fn(parameter)
            if changed is not parameter:
                parameter.data = changed
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _tensor(plain: Callable[..., torch.Tensor], data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``torch.tensor`` reads scalars below every mode: they are asked for first."""

    def values(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [values(part) for part in item]
        return item.item() if isinstance(item, FakeTensor) and item.dim() == 0 else item

    return plain(values(data), *args, **kwargs)
