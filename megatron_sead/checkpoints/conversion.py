"""Hugging Face directory to Megatron-Core checkpoint and back: one weight in memory, the next being read meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_sead.checkpoints.durable import whole_directory
from megatron_sead.checkpoints.huggingface import copy_companions, write_config
from megatron_sead.checkpoints.manifest import Manifest, write_manifest
from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel, ModelFiles, megatron_key
from megatron_sead.checkpoints.read_ahead import read_ahead
from megatron_sead.checkpoints.shard_writer import SHARD_BYTES, ShardWriter
from megatron_sead.checkpoints.torch_dist_writer import FORMAT_VERSION, TorchDistWriter
from megatron_sead.errors import UserError
from megatron_sead.models.builder import DTYPES
from megatron_sead.models.huggingface import NamedWeight

Advance = Callable[[int, int], None]  # bytes of weights done, of how many

# Modules that keep a state beside their weights, for scales of fp8; Megatron asks a checkpoint for all of them. The
# first four are there with torch's modules, the rest with Transformer Engine's.
LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
LAST_STATES = ("decoder.final_layernorm",)


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
        overwrite: replace what `output` is.
        advance: is told how far it is.

    Raises:
        UserError: a damaged, incomplete or foreign model, NaN or infinity in a weight, no room, `output` exists.
    """
    with HuggingFaceModel(source) as model:
        dtype = dtype or model.single_dtype()
        conversion = _begin(model, dtype)
        conversion.ignored = sorted(model.files.ignored())
        with whole_directory(output, overwrite=overwrite, weight_bytes=conversion.bytes) as temporary:
            writer = TorchDistWriter(temporary)
            layers, done = model.config.num_layers, 0
            for named, tensor in read_ahead(_joined(_checked_weights(model, conversion, dtype))):
                layer = None if named.layer is None else (named.layer, layers)
                writer.add_tensor(megatron_key(named), tensor, layer=layer, padding_rows=_padding_rows(named))
                done += _bytes(named, dtype)
                if advance:
                    advance(done, conversion.bytes)
            _add_states(writer, layers)
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
) -> Conversion:
    """Write a Hugging Face directory that transformers (4.57 and 5.x) and vLLM load as it is.

    Args:
        checkpoint: a converted one, or one of a training run under any layout (`find_checkpoint`); of a run's, the
            weights alone, and configuration and tokenizer from where the run began.
        max_shard_bytes: of a file's tensors.
        overwrite: replace what `output` is.
        advance: is told how far it is.

    Raises:
        UserError: a damaged or foreign checkpoint, NaN or infinity in a weight, no room, `output` exists.
    """
    with MegatronModel(checkpoint) as model:
        dtype = model.single_dtype()
        conversion = _begin(model, dtype)
        with whole_directory(output, overwrite=overwrite, weight_bytes=conversion.bytes) as temporary:
            writer = ShardWriter(temporary, model.shapes, dtype, max_shard_bytes)
            done = 0
            for named, parts in read_ahead(_checked_weights(model, conversion, dtype)):
                for name, part in zip(named.names, parts, strict=True):
                    writer.add(name, part)
                done += _bytes(named, dtype)
                if advance:
                    advance(done, conversion.bytes)
            writer.finish()
            write_config(model.source, temporary, dtype)
            copy_companions(model.source, temporary)
    return conversion


def _begin(model: ModelFiles, dtype: torch.dtype) -> Conversion:
    name = next(name for name, known in DTYPES.items() if known == dtype)
    parameters = model.parameters
    return Conversion(model.directory, len(model.shapes), parameters, parameters * dtype.itemsize, name)


def _bytes(named: NamedWeight, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in named.weight.shapes) * dtype.itemsize


def _padding_rows(named: NamedWeight) -> int:
    return (named.weight.padded_rows or named.weight.shapes[0][0]) - named.weight.shapes[0][0]


def _joined(
    weights: Iterable[tuple[NamedWeight, list[torch.Tensor]]],
) -> Iterator[tuple[NamedWeight, torch.Tensor]]:
    """Megatron's tensor of each weight, whole, without padding."""
    for named, parts in weights:
        yield named, named.weight.join(parts).contiguous()


def _add_states(writer: TorchDistWriter, layers: int) -> None:
    for module in LAYER_STATES:
        for layer in range(layers):
            writer.add_object(f"decoder.layers.{module}._extra_state", None, layer=(layer, layers))
    for module in LAST_STATES:
        writer.add_object(f"{module}._extra_state", None)


def _checked_weights(
    model: ModelFiles, conversion: Conversion, dtype: torch.dtype
) -> Iterator[tuple[NamedWeight, list[torch.Tensor]]]:
    """Every weight with its Hugging Face tensors, in `dtype`."""
    for named in model.weights:
        parts = model.read(named)
        for name, part in zip(named.names, parts, strict=True):
            _check(model, name, part, conversion)
        yield named, [part.to(dtype) for part in parts]


def _check(model: ModelFiles, name: str, tensor: torch.Tensor, conversion: Conversion) -> None:
    """One pass over the tensor: its extremes are NaN or infinite where any element is."""
    low, high = torch.aminmax(tensor)
    if not (low.isfinite() and high.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{model.directory}: {name} has {bad:,} of {tensor.numel():,} elements that are NaN or infinite"
        )
    if low == high == 0:
        conversion.all_zero.append(name)
