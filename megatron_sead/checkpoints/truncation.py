"""The first layers of a model as a model of its own: small, and with real weights, to try a cluster with."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_sead.checkpoints.conversion import Advance
from megatron_sead.checkpoints.huggingface import copy_companions
from megatron_sead.checkpoints.model_files import HuggingFaceModel
from megatron_sead.checkpoints.read_ahead import read_ahead
from megatron_sead.checkpoints.shard_writer import SHARD_BYTES, ShardWriter
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.files.durable import write_json
from megatron_sead.files.outputs import whole_directory
from megatron_sead.models.family import read_hf_config


def truncate(
    source: Path,
    output: Path,
    *,
    layers: int,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    advance: Advance | None = None,
) -> int:
    """Write the first `layers` layers with embedding, final norm and head, every byte as it was. One tensor in memory.

    config.json is the source's, but for the number of layers and their kinds; tokenizer and the rest are copied.

    Args:
        source: Hugging Face directory.
        output: appears when it is whole.
        advance: is told the bytes done, of how many.

    Returns:
        Parameters written.

    Raises:
        UserError: the model has not so many layers; its dtypes are mixed; damaged files; no room; `output` exists.
    """
    with HuggingFaceModel(source) as model:
        if not 1 <= layers <= model.config.num_layers:
            raise ArgumentError(
                "layers", layers, f"must be from 1 to {model.config.num_layers}, the layers of {source}"
            )
        names = [name for w in model.weights if w.layer is None or w.layer < layers for name in w.names]
        dtypes = {model.files.dtype(name) for name in names}
        if len(dtypes) > 1:
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise UserError(f"{source}: its tensors are of several dtypes ({found}); make them one, and truncate that")
        dtype = dtypes.pop()
        shapes = {name: shape for name, shape in model.shapes.items() if name in set(names)}
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        total, done = parameters * dtype.itemsize, 0
        with whole_directory(output, inputs=[source], overwrite=overwrite, weight_bytes=total) as temporary:
            writer = ShardWriter(temporary, shapes, dtype, max_shard_bytes)
            for name, tensor in read_ahead((name, model.files.read(name)) for name in names):
                writer.add(name, tensor)
                done += tensor.nbytes
                if advance:
                    advance(done, total)
            writer.finish()
            config = read_hf_config(source)
            config["num_hidden_layers"] = layers
            if config.get("layer_types"):
                config["layer_types"] = config["layer_types"][:layers]
            write_json(temporary / "config.json", config)
            copy_companions(source, temporary)
    return parameters
