"""Operations that ran before on tensors of the same kinds: FakeTensor, which takes longest, is asked once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from megatron_sead.tracing.shadows import tensors_of

aten = torch.ops.aten
# Whose results are not what their schemas and arguments say
NEVER = {aten.resize_.default, aten.set_.source_Storage, aten.lift_fresh.default, aten.lift_fresh_copy.default}


class Kind(NamedTuple):
    """Of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: FakeTensor) -> Kind:
        return Kind(tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device)


IN_PLACE = object()
_known: dict[Any, Any] = {}  # what an operation returns: IN_PLACE, a kind, or a list of kinds


def run(mode: FakeTensorMode, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation's result, as a FakeTensor, or several."""
    if func.is_view or func in NEVER or torch.Tag.inplace_view in func.tags:
        return func(*args, **kwargs)
    try:
        key = func, _key(args), _key(list(kwargs.items()))
        known = _known.get(key)
    except TypeError:  # an argument without a hash
        return func(*args, **kwargs)
    if known is IN_PLACE:
        return args[0]
    if known is not None:
        return _made(mode, known)
    result = func(*args, **kwargs)
    described = _described(func, args, result)
    if described is not None:
        _known[key] = described
    return result


def _key(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return Kind.of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, torch.Tensor | dict):
        raise TypeError
    return value.__class__, value  # True is 1, and 1 is 1.0


def _described(func: Any, args: Any, result: Any) -> Any:
    """What there is to know to make the result again; None: nothing."""
    if func._schema.is_mutable:
        return IN_PLACE if result is args[0] and isinstance(result, FakeTensor) else None
    if isinstance(result, list | tuple):
        kinds = [_described(func, args, part) for part in result]
        return None if None in kinds or any(isinstance(kind, list) for kind in kinds) else kinds
    if not isinstance(result, FakeTensor) or _lies_in(result, args):  # as _unsafe_view, whose schema does not tell
        return None
    size = sum((n - 1) * s for n, s in zip(result.shape, result.stride(), strict=True)) + 1 if result.numel() else 0
    whole = result.storage_offset() == 0 and result.untyped_storage().nbytes() == size * result.element_size()
    return Kind.of(result) if whole and result.layout is torch.strided else None


def _lies_in(result: FakeTensor, args: Any) -> bool:
    """Is a result's memory that of an argument?"""
    memory = result.untyped_storage()._cdata
    return any(tensor.untyped_storage()._cdata == memory for tensor in tensors_of(args))


def _made(mode: FakeTensorMode, kind: Any) -> Any:
    if isinstance(kind, list):
        return tuple(_made(mode, part) for part in kind)
    with unset_fake_temporarily():
        meta = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device="meta")
        return FakeTensor(mode, meta, kind.device)
