"""A trained model as a Hugging Face directory: written as a stream, one shard in memory, and compared bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sead.checkpoints.manifest import from_first_rank
from megatron_sead.checkpoints.model_files import model_weights
from megatron_sead.checkpoints.shard_writer import SHARD_BYTES, ShardWriter
from megatron_sead.errors import UserError
from megatron_sead.files.durable import write_json
from megatron_sead.files.names import TOKENIZER_FILES, TOKENIZER_SETTINGS
from megatron_sead.files.outputs import Output
from megatron_sead.models.family import family_of, read_hf_config
from megatron_sead.models.tensor_files import TensorFiles
from megatron_sead.models.token_ids import portable_tokenizer
from megatron_sead.models.weights import tensor_shapes

# What a model directory holds beside weights and config.json. Not its README: that speaks of another model.
COMPANIONS = ("generation_config.json", *TOKENIZER_FILES)

Weights = Iterable[tuple[str, torch.Tensor]]
Finish = Callable[[Path], None]  # the last word on a directory's settings, before it takes its name


def write_huggingface_directory(
    directory: Path,
    weights: Weights,
    *,
    source: Path,
    group: dist.ProcessGroup,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    finish: Finish | None = None,
) -> None:
    """Write a model that transformers and vLLM load. Collective: every rank iterates, the first one writes.

    It is complete or absent: written beside `directory` and renamed. An earlier one, as it was written, is replaced.

    Args:
        weights: (Hugging Face name, whole tensor), on every rank.
        source: the directory that the model began as: gives config.json, generation settings, tokenizer and chat
            template.
        group: gloo, all ranks.
        dtype: of the tensors written; None: the first one's.
        max_shard_bytes: of a file's tensors. A larger tensor has a file of its own.
        finish: is called on the first rank with the directory when all files are there, and may change the settings.

    Raises:
        UserError: the disk refuses, or `directory` holds what was not written here.
    """
    writer: _DirectoryWriter | None = None
    refusal: UserError | None = None
    if dist.get_rank(group) == 0:
        try:
            writer = _DirectoryWriter(directory, source, dtype, max_shard_bytes, finish)
        except (OSError, UserError) as error:
            refusal = _refusal(directory, error)
    for name, tensor in weights:  # to the end on every rank, even when the disk has refused: making them is collective
        if writer is not None and refusal is None:
            try:
                writer.add(name, tensor)
            except OSError as error:
                refusal = _refusal(directory, error)
    if writer is not None and refusal is None:
        try:
            writer.finish()
        except (OSError, UserError) as error:
            refusal = _refusal(directory, error)
    if writer is not None:
        writer.output.discard()
    refusal = from_first_rank(refusal, group)
    if refusal is not None:
        raise refusal


class _DirectoryWriter:
    """What the first rank writes. The dtype of the files may be known only with the first tensor."""

    def __init__(
        self, directory: Path, source: Path, dtype: torch.dtype | None, max_shard_bytes: int, finish: Finish | None
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self._finish = finish
        self.shapes = huggingface_shapes(source)
        self.output = Output(directory, inputs=[source], overwrite=True)
        self._shards: ShardWriter | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._shards is None:
            dtype = self.dtype or tensor.dtype
            self._shards = ShardWriter(self.output.temporary, self.shapes, dtype, self.max_shard_bytes)
        self._shards.add(name, tensor)

    def finish(self) -> None:
        assert self._shards is not None, "no weights came"
        self._shards.finish()
        write_settings(self.source, self.output.temporary, self._shards.dtype)
        if self._finish is not None:
            self._finish(self.output.temporary)
        self.output.take_name()


def huggingface_shapes(hf_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that config.json calls for, in the order of the files."""
    _, weights = model_weights(hf_dir)
    return tensor_shapes(weights)


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
    problem: str | None = None
    seen: set[str] = set()
    with ExitStack() as stack:
        files: TensorFiles | None = None
        if dist.get_rank(group) == 0:
            try:
                files = stack.enter_context(TensorFiles(directory))
            except UserError as error:
                problem = str(error)
        for name, tensor in weights:
            if files is not None and problem is None:
                problem = _difference(files, name, tensor if dtype is None else tensor.to(dtype))
                seen.add(name)
        if files is not None and problem is None and (unknown := sorted(files.file_of.keys() - seen)):
            problem = f"{unknown[0]} is not a weight of the model"
    problem = from_first_rank(problem, group)
    if problem is not None:
        raise RuntimeError(f"{directory} is not the trained model: {problem}")


def _difference(files: TensorFiles, name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the written form of a weight."""
    if name not in files.file_of:
        return f"{name} is missing"
    try:
        written, tensor = files.read(name), tensor.detach().cpu().contiguous()
    except UserError as error:
        return str(error)
    if (written.dtype, written.shape) != (tensor.dtype, tensor.shape):
        return f"{name} is {written.dtype} {list(written.shape)}, not {tensor.dtype} {list(tensor.shape)}"
    # As bytes, so that a NaN equals itself and -0 is not 0
    if not torch.equal(written.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
        different = int((written != tensor).sum())
        return f"{name} differs in {different} of {tensor.numel()} elements"
    return None


def write_settings(source: Path, directory: Path, dtype: torch.dtype) -> None:
    """config.json for weights of this dtype and `COMPANIONS`, in forms that transformers 4.57 and 5.x read."""
    hf = read_hf_config(source)
    config = family_of(hf["model_type"]).portable_config(hf, source / "config.json")
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", config | {"dtype": name, "torch_dtype": name})
    copy_companions(source, directory)
    tokenizer = directory / TOKENIZER_SETTINGS
    with suppress(FileNotFoundError, ValueError):  # what is no JSON stays as it was
        settings = json.loads(tokenizer.read_text(encoding="utf-8"))
        if portable_tokenizer(settings) != settings:
            write_json(tokenizer, portable_tokenizer(settings))


def copy_companions(source: Path, directory: Path) -> None:
    """Generation settings, tokenizer and chat template. The caller flushes the directory.

    Raises:
        UserError: one is a link to nothing, as in a hub's cache of which a file was lost: without it, the model would
            be spoken to in another way.
    """
    for name in COMPANIONS:
        if (source / name).is_symlink() and not (source / name).exists():
            raise UserError(f"{source / name}: is a link to {(source / name).readlink()}, which is missing")
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def _refusal(directory: Path, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{directory}: the model cannot be written there ({error})")
