"""Real values of small tensors on the host, beside the fakes that stand for them.

A step reads a few tensors: counts, norms, masks that choose tokens. What is small is therefore computed for real, and
what cannot be known (anything made from large tensors) is a random number between 0.1 and 1, the same on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map

SMALL = 2**16  # elements
NUMBERS_A_TOKEN = 16  # of tensors with a row for each token of a step, which are small however long the step is

aten = torch.ops.aten
UNWRITTEN = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# What has a size, or a result, that only values tell
BY_VALUE = {
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten.equal.default,
}

_generator = torch.Generator()
_tokens = 0


def expect_tokens(count: int) -> None:
    """A step of all replicas has so many tokens."""
    global _tokens
    _tokens = count


def is_small(tensor: torch.Tensor) -> bool:
    elements = tensor.numel()
    if elements <= SMALL:
        return True
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    return width <= NUMBERS_A_TOKEN and elements <= width * _tokens


def shadow_of(tensor: torch.Tensor) -> torch.Tensor:
    """A small tensor's values, which may be written; of one that nothing has computed, random ones."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    if not hasattr(tensor, "shadow"):
        set_shadow(tensor, unknown(tensor))
    shadow: torch.Tensor = vars(tensor)["shadow"]
    return shadow


def set_shadow(tensor: torch.Tensor, values: torch.Tensor) -> None:
    assert values.shape == tensor.shape, f"{list(values.shape)} stands for {list(tensor.shape)}"
    tensor.shadow = values  # type: ignore[attr-defined]


def unknown(like: torch.Tensor) -> torch.Tensor:
    """Random values of a tensor's shape; integers and truth values are zero."""
    with unset_fake_temporarily():
        shape, dtype = tuple(like.shape), like.dtype
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        _generator.manual_seed(hash(shape) % 2**31)
        values = (torch.rand(shape, generator=_generator) * 0.9 + 0.1).to(dtype)
        if like.is_contiguous() or 0 in like.stride():
            return values
        return torch.empty_strided(shape, like.stride(), dtype=dtype).copy_(values)  # views of it must be possible


def tensors_of(*values: Any) -> list[torch.Tensor]:
    """Those in arguments or results of an operation, lists among them included."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(*value)
    return found


def is_cuda(tensor: torch.Tensor) -> bool:
    """As ``tensor.is_cuda``, which of a fake takes long."""
    return tensor.fake_device.type == "cuda" if isinstance(tensor, FakeTensor) else tensor.is_cuda


def follow(
    func: Any, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor], results: list[torch.Tensor]
) -> None:
    """Give the small results of an operation, and what it has written to, their values; those that are not known get
    theirs when they are asked for."""
    changed = [fake for fake in written(func, args, kwargs) if is_small(fake)]
    if not changed and not any(map(is_small, results)):
        return
    if func not in UNWRITTEN and all(map(is_small, inputs)):
        values = _compute(func, args, kwargs)
        for fake, value in zip(results, tensors_of(values), strict=True):
            set_shadow(fake, value)
        return
    for fake in changed:  # from what is not known
        if hasattr(fake, "shadow"):
            with unset_fake_temporarily():
                fake.shadow.copy_(unknown(fake))


def by_value(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of one of `BY_VALUE`, its tensors as fakes on the device of the operation's first one."""
    device = tensors_of(args, list(kwargs.values()))[0].device

    def stand_in(value: Any) -> Any:
        return _fake_of(value, device) if isinstance(value, torch.Tensor) else value

    return tree_map(stand_in, _compute(func, args, kwargs))


def places_where(mask: torch.Tensor) -> list[torch.Tensor]:
    """A mask as one tensor of indices for each of its dimensions."""
    with unset_fake_temporarily():
        columns = [column.contiguous() for column in shadow_of(mask).nonzero().unbind(1)]
    return [_fake_of(column, mask.device) for column in columns]


def _fake_of(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    fake = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=device)
    set_shadow(fake, values)
    return fake


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    named = {name: _real(value) for name, value in kwargs.items()}
    if named.get("pin_memory"):
        named["pin_memory"] = False
    arguments = [_real(value) for value in args]
    with unset_fake_temporarily():
        return func(*arguments, **named)


def _real(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return shadow_of(value)
    if isinstance(value, list | tuple):
        return [_real(part) for part in value]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors among the arguments that the operation writes to."""
    if not func._schema.is_mutable:
        return []
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors_of(*(named.get(name) for name in writes))
