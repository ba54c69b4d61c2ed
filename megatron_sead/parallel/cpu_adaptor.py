"""Lets Megatron-Core run on a CPU.

Megatron-Core calls ``torch.cuda`` in a few dozen places: to ask for the current device, to seed, to name tensor
types, to make streams. This file gives those names CPU answers, and nothing else: which ranks talk to which, and
what a layer computes, stays Megatron's. So every parallel layout runs for real, over gloo, on any machine.

It changes ``torch`` for the whole process. That is why it is applied by an explicit call, only where a run asks for
``device: cpu``, before Megatron is imported; why it is logged; and why `restore_cuda` can undo it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from megatron_sead.parallel.idle_streams import IdleEvent, IdleStream, always

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

_ABSENT = object()
_replaced: list[tuple[Any, str, Any]] = []  # owner, attribute, what was there; undone in reverse order


def is_adapted() -> bool:
    """Whether this process answers CUDA's names with the CPU."""
    return bool(_replaced)


def adapt_to_cpu() -> None:
    """Make Megatron-Core run on the CPU in this process. Idempotent.

    Raises:
        RuntimeError: Megatron-Core was imported before: its modules have already kept CUDA's types and functions.
    """
    if is_adapted():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("adapt_to_cpu() must run before megatron.core is imported")
    _answer_cuda_names()
    _answer_tensor_types()
    _move_devices_to_cpu()
    _stand_in_for_triton()
    _leave_fusions_uncompiled()
    _adapt_megatron_rng()
    log.info("Megatron-Core is adapted to the CPU: %d names of torch and Megatron answer for it", len(_replaced))


def restore_cuda() -> None:
    """Undo `adapt_to_cpu`: torch is as it was. Megatron modules that are imported by now stay adapted."""
    while _replaced:
        owner, name, before = _replaced.pop()
        if isinstance(owner, dict):
            owner.pop(name)
        elif before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


# --- torch.cuda: one device, no streams, the CPU's generator --------------------------------------------------------


def _memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed: that one seeds CUDA too, through the very name that this function answers.
    torch.default_generator.manual_seed(int(seed))


def _answer_cuda_names() -> None:
    stream = IdleStream()
    properties = types.SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        multi_processor_count=os.cpu_count(),
        total_memory=_memory()[1],
        gcnArchName="",  # torch asks for it, of AMD's, when vLLM compiles
    )
    answers: dict[str, Any] = {
        "is_available": always(False),
        "is_initialized": always(True),
        "device_count": always(1),
        "current_device": always(CPU),
        "set_device": always(None),
        "synchronize": always(None),
        "empty_cache": always(None),
        "get_device_capability": always((0, 0)),
        "get_device_properties": always(properties),
        "get_device_name": always("cpu"),
        "is_bf16_supported": always(True),
        "Stream": IdleStream,
        "Event": IdleEvent,
        "stream": always(nullcontext()),
        "current_stream": always(stream),
        "default_stream": always(stream),
        "memory_allocated": always(0),
        "max_memory_allocated": always(0),
        "memory_reserved": always(0),
        "max_memory_reserved": always(0),
        "memory_stats": always({}),
        "reset_peak_memory_stats": always(None),
        "mem_get_info": lambda device=None: _memory(),
        "_lazy_init": always(None),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": _manual_seed,
        "manual_seed_all": always(None),  # the CPU's generator is seeded by whoever calls this
    }
    for name, answer in answers.items():
        _replace(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        _replace(torch.cuda.random, name, answers[name])
    for name in ("range_push", "range_pop", "mark"):
        _replace(torch.cuda.nvtx, name, always(None))
    _replace(torch.cuda.nvtx, "range", always(nullcontext()))


# --- Tensor types: Megatron uses them in isinstance checks, and compares the names that Tensor.type() gives ---------


def _answer_tensor_types() -> None:
    for name in [n for n in vars(torch.cuda) if n.endswith("Tensor") and hasattr(torch, n)]:
        _replace(torch.cuda, name, getattr(torch, name))

    named = torch.Tensor.type

    @functools.wraps(named)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return named(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return named(self, dtype, *args, **kwargs)

    _replace(torch.Tensor, "type", type_)


# --- Devices: whoever asks for "cuda" gets the CPU ------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _with_cpu_device(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _move_devices_to_cpu() -> None:
    """Wrap what makes or moves tensors.

    Wrapping, not a TorchFunctionMode: a mode is off inside backward(), where recompute makes tensors.
    """
    from torch.utils import _device

    # The cache is filled with the originals first: `with torch.device("meta")` recognises factories by it.
    originals = _device._device_constructors()
    for module in (torch, torch.fft):
        for name, value in list(vars(module).items()):
            is_function = isinstance(value, types.BuiltinFunctionType | types.FunctionType)
            if is_function and (value in originals or name.endswith("_like")):
                _replace(module, name, _with_cpu_device(value))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        _replace(torch.Tensor, name, _with_cpu_device(getattr(torch.Tensor, name)))

    move = torch.Tensor.to

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    _replace(torch.Tensor, "to", to)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, device=None: self)


# --- Megatron-Core itself -------------------------------------------------------------------------------------------


def _stand_in_for_triton() -> None:
    """Megatron-Core 0.19 imports one module of Triton kernels whatever the model; without Triton, stand in for it.

    Only that module, so that whoever asks for triton itself still sees that it is absent.
    """
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is not None:
        return
    module = types.ModuleType(name)
    module.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    module.paged_stash_copy_kernel = None  # type: ignore[attr-defined]
    module.paged_stash_pop_kernel = None  # type: ignore[attr-defined]
    sys.modules[name] = module
    _replaced.append((sys.modules, name, _ABSENT))


def _leave_fusions_uncompiled() -> None:
    """Megatron-Core marks its fused functions for torch's compiler when it is imported, which imports the compiler: a
    third of the time in which a rank starts. On a CPU no model is built with fusions."""
    compiled = torch.compile

    @functools.wraps(compiled)
    def compile_(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if getattr(model, "__module__", "").startswith("megatron.core."):
            return model
        return compiled(model, *args, **kwargs)

    _replace(torch, "compile", compile_)


class _NoFp8:
    """What Megatron asks Transformer Engine during selective recompute, where there is no Transformer Engine."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class _SilenceRngWarning(logging.Filter):
    """Megatron warns when the CPU's generator moves inside a fork of CUDA's. Here they are one, and it always does."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in str(record.msg)


def _adapt_megatron_rng() -> None:
    rng = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(rng, "_get_cuda_rng_state", lambda device="cuda", clone=False, graph_safe=False: _get_rng_state())
    _replace(rng, "_set_cuda_rng_state", lambda new_state, device=-1, graph_safe=False: _set_rng_state(new_state))
    if not hasattr(rng, "FP8GlobalStateManager"):
        _replace(rng, "FP8GlobalStateManager", _NoFp8)
        _replace(rng, "fp8_autocast", always(nullcontext()))
        _replace(rng, "activation_recompute_forward", always(nullcontext()))
    logger = logging.getLogger(rng.__name__)
    if not any(isinstance(existing, _SilenceRngWarning) for existing in logger.filters):
        logger.addFilter(_SilenceRngWarning())
