"""Weights from a Hugging Face directory into model chunks, and back out of any layout, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sead.models.config import ModelConfig
from megatron_sead.models.decoder import Decoder
from megatron_sead.models.tensor_files import TensorFiles
from megatron_sead.models.weight_tables import Weight
from megatron_sead.models.weights import PlacedWeight, named_weights, placed_weights
from megatron_sead.parallel.context import ParallelContext

OpenWeights = Callable[[Path], TensorFiles]  # what opens a directory's weights

# --- In --------------------------------------------------------------------------------------------------------------


def check_huggingface_weights(config: ModelConfig, hf_dir: Path, open_weights: OpenWeights = TensorFiles) -> None:
    """The directory holds the model that its config.json describes. Reads headers, and a head that is the embedding
    once more; before any memory is taken.

    Raises:
        UserError: as `load_huggingface_weights` does.
    """
    with open_weights(hf_dir) as files:
        files.check(list(named_weights(config)))
        files.check_repeated()


@torch.no_grad()
def load_huggingface_weights(
    models: list[Decoder], hf_dir: Path, parallel: ParallelContext, open_weights: OpenWeights = TensorFiles
) -> None:
    """Fill this rank's chunks, reading only this rank's slices. Every rank checks every tensor's name and shape.

    Args:
        models: this rank's chunks.
        hf_dir: ``model.safetensors``, or ``model.safetensors.index.json`` and its files; fp64, fp32, fp16 or bf16.

    Raises:
        UserError: it is ambiguous which files are the model; a file is missing or truncated; a tensor is missing,
            unknown, or has another shape or a dtype that is not tested.
    """
    with open_weights(hf_dir) as files:
        weights = list(placed_weights(models[0].config, models[0].config.stage_layers))
        files.check(weights)
        parameters = [dict(model.named_parameters()) for model in models]
        for placed in weights:
            if placed.pp_rank == parallel.pp_rank:
                parameter = parameters[placed.chunk].pop(placed.parameter)
                parts = [read_share(files, name, placed.weight, parallel) for name in placed.names]
                parameter.copy_(placed.weight.join(parts))
        left = [name for rest in parameters for name in rest]
        assert not left, f"no Hugging Face tensor for {left}"


def read_share(files: TensorFiles, name: str, weight: Weight, parallel: ParallelContext) -> torch.Tensor:
    """This tensor-parallel rank's part of one Hugging Face tensor, zero rows in place of padding."""
    tensor = files.slice(name)
    if weight.tp_dim is None:
        return tensor[:]
    rows = weight.padded_rows or tensor.get_shape()[weight.tp_dim]
    share = rows // parallel.tp_size
    first, last = parallel.tp_rank * share, (parallel.tp_rank + 1) * share
    if weight.tp_dim == 1:
        return tensor[:, first:last]
    true_rows = tensor.get_shape()[0]
    part = tensor[min(first, true_rows) : min(last, true_rows)]
    if part.shape[0] == share:
        return part
    padding = part.new_zeros(share - part.shape[0], *part.shape[1:])
    return torch.cat([part, padding])


# --- Out -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def iterate_huggingface_weights(models: list[Decoder], parallel: ParallelContext) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor) of every weight, on every rank, whatever the layout.

    Collective over tensor- and pipeline-parallel groups: every rank must consume it to the end, in step. One
    parameter is whole at a time. The tensors are in the model's dtype, on its device, and may be parts of its
    parameters: whoever wants them unchanged after the next update copies them.
    """
    parameters = [dict(model.named_parameters()) for model in models]
    for placed in placed_weights(models[0].config, models[0].config.stage_layers):
        if placed.is_copy:
            continue
        shard = None
        if placed.pp_rank == parallel.pp_rank:
            shard = parameters[placed.chunk][placed.parameter].detach()
        yield from zip(placed.names, whole_tensors(placed, shard, models[0].config.params_dtype, parallel), strict=True)


def whole_tensors(
    placed: PlacedWeight, shard: torch.Tensor | None, dtype: torch.dtype, parallel: ParallelContext
) -> list[torch.Tensor]:
    """Hugging Face tensors of one weight, from the shard of each rank that holds it. Collective.

    Args:
        shard: this rank's share, or anything of its shape (a gradient); None on other pipeline stages.
    """
    if shard is not None:
        parts = _gather(placed.weight, shard, parallel)
    else:
        parts = [torch.empty(shape, dtype=dtype, device=parallel.device) for shape in placed.weight.shapes]
    if parallel.pp_size > 1:
        for part in parts:
            dist.broadcast(part, group=parallel.pp, group_src=placed.pp_rank)
    return parts


def _gather(weight: Weight, shard: torch.Tensor, parallel: ParallelContext) -> list[torch.Tensor]:
    shards = [shard]
    if weight.tp_dim is not None and parallel.tp_size > 1:
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(parallel.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=parallel.tp)
    by_rank = [weight.split(s) for s in shards]
    if weight.padded_rows is not None:  # the last ranks hold the padding
        share, true_rows = shard.shape[0], weight.shapes[0][0]
        by_rank = [[part[: max(0, true_rows - rank * share)] for part in parts] for rank, parts in enumerate(by_rank)]
    dim = weight.tp_dim or 0
    return [parts[0] if len(parts) == 1 else torch.cat(parts, dim) for parts in zip(*by_rank, strict=True)]
