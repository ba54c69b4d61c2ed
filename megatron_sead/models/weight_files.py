"""Which safetensors files of a Hugging Face directory are the model, and where in them each tensor is. No torch here: a
run's inputs are checked before there is any.

transformers takes model.safetensors where there is one, and else the files that the index names; vLLM goes by the
index. A directory in which the two would not load the same tensors is refused.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sead.errors import UserError
from megatron_sead.files.names import INDEX

SINGLE = "model.safetensors"
SHARD = re.compile(r"model-\d+(-of-\d+)?\.safetensors")
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # buffers that old transformers saved
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of the dtypes that weights may have
LARGEST_HEADER = 100_000_000  # as safetensors itself has it


class TensorPlace(NamedTuple):
    """Of a tensor in its file."""

    file: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    offset: int  # of its first byte


def has_weights(hf_dir: Path) -> bool:
    """Whether there is a file that transformers would begin with, whole or not."""
    return (hf_dir / SINGLE).is_file() or (hf_dir / INDEX).is_file()


def weight_files(hf_dir: Path) -> list[Path]:
    """The files that transformers would load the model from. They need not be there, if an index names them.

    Raises:
        UserError: there are none, the index is damaged, or it is ambiguous which files are the model.
    """
    return sorted(set(_files_of_tensors(hf_dir).values())) or [hf_dir / SINGLE]


def locate_tensors(hf_dir: Path) -> dict[str, TensorPlace]:
    """Every tensor of the model, from the headers of its files.

    Raises:
        UserError: what `weight_files` raises; a file is missing, truncated or no safetensors; the index does not say
            what the files hold; a tensor is of no floating dtype that is tested.
    """
    placed = _files_of_tensors(hf_dir)
    places: dict[str, TensorPlace] = {}
    for file in weight_files(hf_dir):
        if not file.is_file():
            raise UserError(f"{file}: missing, but {hf_dir / INDEX} names it")
        found = read_header(file)
        for name in found if placed else ():
            if name not in placed:
                raise UserError(f"{file}: holds tensor {name}, of which {hf_dir / INDEX} says nothing")
            if placed[name] != file:
                raise UserError(f"{file}: holds tensor {name}, which {hf_dir / INDEX} places in {placed[name].name}")
        places |= found
    if missing := sorted(placed.keys() - places.keys()):
        file = placed[missing[0]]
        raise UserError(f"{file}: tensor {missing[0]} is missing, but {hf_dir / INDEX} places it there")
    return places


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Of one file: 8 bytes with the length of a JSON header, the header, the tensors.

    Raises:
        UserError: not a whole safetensors file, or a dtype that weights cannot have.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(file, f"truncated: {size:,} bytes, its header is not whole")
            if length > LARGEST_HEADER:
                raise _damaged(file, f"a header of {length:,} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(file, name, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(file, "its header is damaged") from None
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise _damaged(file, f"truncated: {size:,} bytes, its header says {expected:,}")
    return places


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: not a whole safetensors file ({reason}); copy or download it again")


def _place(file: Path, name: str, entry: dict[str, Any], start: int) -> TensorPlace:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(count) is int and count >= 0 for count in (*shape, begin, end)):
        raise ValueError(name)
    if dtype not in ITEM_BYTES and not name.endswith(IGNORED_SUFFIX):
        raise UserError(
            f"{file}: {name} is {dtype}; weights must be {', '.join(ITEM_BYTES)} (a quantized model must be saved "
            "again in bfloat16)"
        )
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise UserError(f"{file}: {name} has {end - begin} bytes, which its shape {list(shape)} does not explain")
    return TensorPlace(file, dtype, shape, start + begin)


def _files_of_tensors(hf_dir: Path) -> dict[str, Path]:
    """What the index says; {} where the model is `SINGLE`."""
    index, single = hf_dir / INDEX, hf_dir / SINGLE
    _refuse_adapter(hf_dir)
    placed = _read_index(index) if index.is_file() else {}
    named = {file.name for file in placed.values()}
    if single.is_file() and placed and named != {SINGLE}:
        other = min(named - {SINGLE})
        raise UserError(
            f"{hf_dir}: holds {SINGLE}, and {INDEX} names {other}: transformers would load the first alone, others the "
            "second; remove the one that is out of date"
        )
    if not single.is_file() and not placed:
        raise UserError(f"{hf_dir}: holds neither {SINGLE} nor {INDEX}{_what_else(hf_dir)}")
    named.add(SINGLE)
    strays = sorted(path.name for path in hf_dir.iterdir() if SHARD.fullmatch(path.name) and path.name not in named)
    if strays:
        beside = f"which {INDEX} does not name" if placed else f"beside {SINGLE} and without an index"
        raise UserError(
            f"{hf_dir}: holds {strays[0]}, {beside}: it is ambiguous which weights are the model's; remove those that "
            "are not"
        )
    return placed


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = {name: index.parent / file for name, file in weight_map.items()}
    except OSError as error:
        raise UserError(f"{index}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        placed = {}
    if not placed:
        raise UserError(
            f"{index}: not a safetensors index: must be JSON with a 'weight_map' of tensors to files; copy or download "
            "it again"
        )
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: places {name} in {file!r}: must be the name of a safetensors file beside it")
    return placed


def _refuse_adapter(hf_dir: Path) -> None:
    if (hf_dir / "adapter_config.json").is_file():
        raise UserError(
            f"{hf_dir}: holds adapter_config.json: transformers would load an adapter on top of the weights; merge it "
            "into the model (merge_and_unload of peft), or take it out"
        )


def _what_else(hf_dir: Path) -> str:
    if shards := sorted(path.name for path in hf_dir.glob("*.safetensors")):
        return f"; {shards[0]} alone does not say which files are the model"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in hf_dir.glob(pattern))
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is not read: it is a pickle, which runs whatever code is in it when it is opened; "
        "save the model again with save_pretrained(safe_serialization=True)"
    )
