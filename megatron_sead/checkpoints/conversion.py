"""Hugging Face directory to Megatron-Core checkpoint and back: a few pieces of a tensor in memory, read ahead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_sead.checkpoints.huggingface import Finish, copy_companions, write_settings
from megatron_sead.checkpoints.manifest import Manifest, write_manifest
from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel, ModelFiles, megatron_key
from megatron_sead.checkpoints.read_ahead import read_ahead
from megatron_sead.checkpoints.shard_writer import SHARD_BYTES, ShardWriter
from megatron_sead.checkpoints.torch_dist_writer import FORMAT_VERSION, TorchDistWriter
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import whole_directory
from megatron_sead.models.builder import DTYPES
from megatron_sead.models.weights import NamedWeight

# A rank reads whole pieces to get its share: small ones let it read little beside that. And the C library gives memory
# of up to 32 MiB back to the next piece; larger pieces would cost a page fault every 4 KiB, a second for each GB.
PIECE_BYTES = 16 * 2**20

Advance = Callable[[int, int], None]  # bytes of weights done, of how many


@dataclass
class Conversion:
    """What was converted."""

    source: Path  # the directory with the weights
    tensors: int  # Hugging Face's
    parameters: int  # without padding
    bytes: int
    dtype: str  # bf16 or fp32
    ignored: list[str] = field(default_factory=list)  # tensors that no model needs
    all_zero: list[str] = field(default_factory=list)  # tensors that should not be


def huggingface_to_megatron(
    source: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Conversion:
    """Write a torch_dist checkpoint that Megatron-Core 0.16 and newer load under any layout.

    `output` is the checkpoint itself (``dist_checkpointing.load(state, output)``), with config.json as it was,
    generation settings, tokenizer, chat template, and ``manifest.json`` as a training run's checkpoints have it.

    Args:
        source: config.json and safetensors.
        dtype: of the checkpoint; None: the source's.
        overwrite: replace `output`, if it was written here and is as it was.
        advance: is told how far it is.

    Raises:
        UserError: a damaged, incomplete or foreign model, NaN or infinity in a weight, no room, `output` exists.
    """
    with HuggingFaceModel(source) as model:
        dtype = dtype or model.single_dtype()
        model.check_repeated()
        conversion = _begin(model, dtype)
        conversion.ignored = sorted(model.files.ignored())
        room = conversion.bytes
        with whole_directory(output, inputs=[source], overwrite=overwrite, weight_bytes=room) as temporary:
            writer = TorchDistWriter(temporary)
            layers, done = model.config.num_layers, 0
            for named in model.weights:
                whole = _padded_shape(named)
                writer.announce(megatron_key(named), dtype, whole if named.layer is None else (layers, *whole))
            for piece in read_ahead(_megatron_pieces(model, dtype, conversion)):
                writer.add_rows(megatron_key(piece.named), piece.row, piece.rows, layer=piece.named.layer)
                done += piece.rows.nbytes
                if advance:
                    advance(min(done, conversion.bytes), conversion.bytes)  # padding is not counted
            _add_states(writer, model)
            writer.finish()
            shutil.copyfile(source / "config.json", temporary / "config.json")
            copy_companions(source, temporary)
            layout = {"tensor": 1, "pipeline": 1, "virtual": 1, "data": 1}
            manifest = Manifest(0, FORMAT_VERSION, layout, writer.files, conversion.dtype, conversion.parameters)
            write_manifest(temporary, manifest)
    return conversion


def megatron_to_huggingface(
    checkpoint: Path,
    output: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    advance: Advance | None = None,
    finish: Finish | None = None,
) -> Conversion:
    """Write a Hugging Face directory that transformers (4.57 and 5.x) and vLLM load as it is.

    Args:
        checkpoint: a converted one, or one of a training run under any layout (`find_checkpoint`); of a run's, the
            weights alone, and configuration and tokenizer from where the run began.
        max_shard_bytes: of a file's tensors.
        overwrite: replace `output`, if it was written here and is as it was.
        advance: is told how far it is.
        finish: is called with the directory when all files are there, and may change the settings.

    Raises:
        UserError: a damaged or foreign checkpoint, NaN or infinity in a weight, no room, `output` exists.
    """
    with MegatronModel(checkpoint) as model:
        dtype = model.single_dtype()
        conversion = _begin(model, dtype)
        inputs, room = [checkpoint, model.directory, model.source], conversion.bytes
        with whole_directory(output, inputs=inputs, overwrite=overwrite, weight_bytes=room) as temporary:
            writer = ShardWriter(temporary, model.shapes, dtype, max_shard_bytes)
            done = 0
            for name, row, rows in read_ahead(_huggingface_pieces(model, conversion)):
                writer.add_rows(name, row, rows)
                done += rows.nbytes
                if advance:
                    advance(done, conversion.bytes)
            writer.finish()
            write_settings(model.source, temporary, dtype)
            if finish is not None:
                finish(temporary)
    return conversion


def _begin(model: ModelFiles, dtype: torch.dtype) -> Conversion:
    name = next(name for name, known in DTYPES.items() if known == dtype)
    parameters = model.parameters
    return Conversion(model.directory, len(model.shapes), parameters, parameters * dtype.itemsize, name)


def _add_states(writer: TorchDistWriter, model: ModelFiles) -> None:
    """Announce the state that modules may keep beside their weights, for scales of fp8.

    Megatron asks a checkpoint for all of them: with torch's modules those of the linear layers, with Transformer
    Engine's those of norms and the core attention.
    """
    layers = model.config.num_layers
    for named in model.weights:
        if named.layer is not None:
            module = megatron_key(named).removesuffix(".weight")
            writer.add_object(f"{module}._extra_state", None, layer=(named.layer, layers))
    for layer in range(layers):
        writer.add_object("decoder.layers.self_attention.core_attention._extra_state", None, layer=(layer, layers))
    writer.add_object("decoder.final_layernorm._extra_state", None)


class _Piece(NamedTuple):
    """Rows of Megatron's tensor of a weight."""

    named: NamedWeight
    row: int
    rows: torch.Tensor


def _padded_shape(named: NamedWeight) -> tuple[int, ...]:
    whole = named.weight.whole_shape
    return (named.weight.padded_rows or whole[0], *whole[1:])


def _megatron_pieces(model: HuggingFaceModel, dtype: torch.dtype, conversion: Conversion) -> Iterator[_Piece]:
    """Every weight as Megatron has it, read where its rows are in the safetensors; then its padding."""
    values = _Values(model)
    for named in model.weights:
        shape = named.weight.whole_shape
        step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        spans = named.weight.row_spans()
        for row in range(0, shape[0], step):
            rows = torch.empty(min(step, shape[0] - row), *shape[1:], dtype=dtype)
            for span in spans:
                if (found := span.overlap(row, len(rows))) is not None:
                    of_piece, first = found
                    _read_rows(model, named.names[span.part], first, rows[of_piece])
                    values.check(named.names[span.part], rows[of_piece])
            yield _Piece(named, row, rows)
        if padding := _padded_shape(named)[0] - shape[0]:
            yield _Piece(named, shape[0], torch.zeros(padding, *shape[1:], dtype=dtype))
    conversion.all_zero = values.all_zero()


def _read_rows(model: HuggingFaceModel, name: str, row: int, into: torch.Tensor) -> None:
    stored = model.files.dtype(name)
    if stored == into.dtype:
        model.files.read_rows(name, row, into)
    else:
        own = torch.empty(into.shape, dtype=stored)
        model.files.read_rows(name, row, own)
        into.copy_(own)


def _huggingface_pieces(model: MegatronModel, conversion: Conversion) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(Hugging Face name, first row, rows) of every weight, from the pieces that the ranks wrote."""
    values = _Values(model)
    for named in model.weights:
        for name, row, rows in model.rows(named):
            values.check(name, rows)
            yield name, row, rows
    conversion.all_zero = values.all_zero()


class _Values:
    """Looks at every element once, by the extremes of rows, which are NaN or infinite where any element is."""

    def __init__(self, model: ModelFiles) -> None:
        self.model = model
        self.not_zero: set[str] = set()

    def check(self, name: str, rows: torch.Tensor) -> None:
        low, high = torch.aminmax(rows)
        if not (low.isfinite() and high.isfinite()):
            whole = self.model.tensor(name)
            bad = int((~whole.isfinite()).sum())
            if not bad:
                raise UserError(
                    f"{self.model.directory}: {name} has elements of up to {float(whole.abs().max()):.3g}, which "
                    f"{str(rows.dtype).removeprefix('torch.')} cannot hold"
                )
            raise UserError(
                f"{self.model.directory}: {name} has {bad:,} of {whole.numel():,} elements that are NaN or infinite"
            )
        if low != 0 or high != 0:
            self.not_zero.add(name)

    def all_zero(self) -> list[str]:
        return [name for name in self.model.shapes if name not in self.not_zero]
