"""A trained model as a Hugging Face directory: written as a stream, one shard in memory; and proof that it is it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_sead.checkpoints.manifest import flush_directory, from_first_rank
from megatron_sead.errors import UserError
from megatron_sead.models.builder import read_hf_config
from megatron_sead.models.olmo3.config import YarnScaling, olmo3_fields

SHARD_BYTES = 5 * 10**9  # the size that transformers and the hub use
INDEX = "model.safetensors.index.json"

# What a model directory holds beside weights and config.json. Not its README: that speaks of another model.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)

Weights = Iterable[tuple[str, torch.Tensor]]


def write_huggingface_directory(
    directory: Path,
    weights: Weights,
    *,
    source: Path,
    group: dist.ProcessGroup,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model that transformers and vLLM load. Collective: every rank iterates, the first one writes.

    It is complete or absent: written beside `directory` and renamed. A model directory that is there is replaced.

    Args:
        weights: (Hugging Face name, whole tensor), on every rank.
        source: the directory that the model began as: gives config.json, generation settings, tokenizer and chat
            template.
        group: gloo, all ranks.
        dtype: of the tensors written; None: as they come.
        max_shard_bytes: tensors are collected in host memory up to this size, then written. A larger tensor is a
            shard of its own.

    Raises:
        UserError: the disk refuses, or `directory` holds something else than a model.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    writer: _ShardWriter | None = None
    refusal: UserError | None = None
    first = dist.get_rank(group) == 0
    try:
        if first:
            _make_way(directory, temporary)
            writer = _ShardWriter(temporary, dtype, max_shard_bytes)
    except (OSError, UserError) as error:
        refusal = _refusal(directory, error)
    for name, tensor in weights:  # to the end on every rank, even when the disk has refused: making them is collective
        if writer is not None and refusal is None:
            try:
                writer.add(name, tensor)
            except (OSError, SafetensorError) as error:
                refusal = _refusal(directory, error)
    if writer is not None and refusal is None:
        try:
            written = writer.finish()
            _write_config(source, temporary, written)
            _copy_companions(source, temporary)
            _replace(directory, temporary)
        except (OSError, SafetensorError) as error:
            refusal = _refusal(directory, error)
    refusal = from_first_rank(refusal, group)
    if refusal is not None:
        raise refusal


def verify_huggingface_directory(
    directory: Path, weights: Weights, *, group: dist.ProcessGroup, dtype: torch.dtype | None = None
) -> None:
    """Prove that a written directory is the model, bit for bit. Collective: every rank iterates, the first one reads.

    Args:
        weights: the model's own, as `write_huggingface_directory` takes them.
        dtype: what it was given.

    Raises:
        RuntimeError: on every rank; names the first tensor that differs, is missing, or is of no weight.
    """
    reader = _WrittenTensors(directory) if dist.get_rank(group) == 0 else None
    problem = reader.problem if reader is not None else None
    seen = set()
    for name, tensor in weights:
        if reader is not None and problem is None:
            problem = reader.compare(name, tensor if dtype is None else tensor.to(dtype))
            seen.add(name)
    if reader is not None and problem is None and (unknown := sorted(reader.files.keys() - seen)):
        problem = f"{unknown[0]} is not a weight of the model"
    problem = from_first_rank(problem, group)
    if problem is not None:
        raise RuntimeError(f"{directory} is not the trained model: {problem}")


class _ShardWriter:
    """Collects tensors, writes a file when it would be too large. Files are named at the end, with their count."""

    def __init__(self, directory: Path, dtype: torch.dtype | None, max_bytes: int) -> None:
        self.directory = directory
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []  # tensor names
        self.total_bytes = 0
        self.dtypes: set[torch.dtype] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        # A copy: the tensor may be a view of a buffer that is filled again
        tensor = tensor.detach().to("cpu", self.dtype or tensor.dtype, copy=True).contiguous()
        pending_bytes = sum(other.nbytes for other in self.pending.values())
        if self.pending and pending_bytes + tensor.nbytes > self.max_bytes:
            self._write()
        self.pending[name] = tensor
        self.total_bytes += tensor.nbytes
        self.dtypes.add(tensor.dtype)

    def finish(self) -> torch.dtype:
        """Write the rest, and the index of several files. Returns the dtype that the model is in."""
        self._write()
        count = len(self.shards)
        if count == 1:
            (self.directory / _part(1)).rename(self.directory / "model.safetensors")
        else:
            weight_map: dict[str, str] = {}
            for number, names in enumerate(self.shards, 1):
                file = f"model-{number:05d}-of-{count:05d}.safetensors"
                (self.directory / _part(number)).rename(self.directory / file)
                weight_map |= dict.fromkeys(names, file)
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            _write_json(self.directory / INDEX, index)
        return max(self.dtypes, key=lambda dtype: dtype.itemsize)

    def _write(self) -> None:
        self.shards.append(list(self.pending))
        path = self.directory / _part(len(self.shards))
        save_file(self.pending, path, metadata={"format": "pt"})
        self.pending = {}
        _flush(path)


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


class _WrittenTensors:
    """The tensors of a directory, by name."""

    def __init__(self, directory: Path) -> None:
        self.files: dict[str, Any] = {}
        self.problem: str | None = None
        try:
            for path in sorted(directory.glob("*.safetensors")):
                file = safe_open(path, framework="pt")
                self.files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            self.problem = f"{path.name} cannot be read ({error})"

    def compare(self, name: str, tensor: torch.Tensor) -> str | None:
        if name not in self.files:
            return f"{name} is missing"
        written, tensor = self.files[name].get_tensor(name), tensor.detach().cpu().contiguous()
        if (written.dtype, written.shape) != (tensor.dtype, tensor.shape):
            return f"{name} is {written.dtype} {list(written.shape)}, not {tensor.dtype} {list(tensor.shape)}"
        # As bytes, so that a NaN equals itself and -0 is not 0
        if not torch.equal(written.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
            different = int((written != tensor).sum())
            return f"{name} differs in {different} of {tensor.numel()} elements"
        return None


def _write_config(source: Path, directory: Path, dtype: torch.dtype) -> None:
    config = portable_config(read_hf_config(source), source / "config.json")
    name = str(dtype).removeprefix("torch.")
    _write_json(directory / "config.json", config | {"dtype": name, "torch_dtype": name})


def portable_config(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json with its rotary embeddings in the forms that transformers 4.57 and 5.x read, both of them.

    4.57 reads ``rope_theta`` with ``rope_scaling`` and ignores ``rope_parameters``. 5.x reads the first form too, but
    5.23 then gives sliding layers a base of 500000 whatever ``rope_theta`` is; ``rope_parameters`` by layer type
    comes before it (a flat one would drop YaRN). A model whose two kinds of layers have two bases, which the first
    form cannot say, gets the second alone.
    """
    rope = olmo3_fields(hf, source)
    kept = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling", "rope_parameters")}
    full = {"rope_type": "default"} if rope["yarn"] is None else _yarn_fields(rope["yarn"])
    if hf["model_type"] == "olmo2":  # one kind of layers, and a flat form in every version
        return kept | {"rope_theta": rope["full_theta"], "rope_parameters": full | {"rope_theta": rope["full_theta"]}}
    by_type = {
        "sliding_attention": {"rope_type": "default", "rope_theta": rope["sliding_theta"]},
        "full_attention": full | {"rope_theta": rope["full_theta"]},
    }
    if rope["sliding_theta"] != rope["full_theta"]:
        return kept | {"rope_parameters": by_type}
    scaling = None if rope["yarn"] is None else full
    return kept | {"rope_theta": rope["full_theta"], "rope_scaling": scaling, "rope_parameters": by_type}


def _yarn_fields(yarn: YarnScaling) -> dict[str, Any]:
    fields = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    return fields if yarn.truncate else fields | {"truncate": False}


def _copy_companions(source: Path, directory: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, directory / name)
            _flush(directory / name)


def _make_way(directory: Path, temporary: Path) -> None:
    if directory.exists() and not (directory / "config.json").exists():
        raise UserError(f"{directory}: exists and holds no model; move it away, or choose another directory")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _replace(directory: Path, temporary: Path) -> None:
    flush_directory(temporary)
    if directory.exists():
        shutil.rmtree(directory)
    temporary.rename(directory)
    flush_directory(directory.parent)


def _refusal(directory: Path, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{directory}: the model cannot be written there ({error})")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
