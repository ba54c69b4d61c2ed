"""What a directory with a model is, from its configuration and the headers of its files: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sead.checkpoints.manifest import STEP
from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel, open_model
from megatron_sead.errors import UserError
from megatron_sead.files.names import no_directory
from megatron_sead.models.config import ModelConfig
from megatron_sead.models.family import config_fields, family_of, read_hf_config
from megatron_sead.models.layout import divided_by_tensor_parallelism, tensor_parallel_sizes


@dataclass
class Inspection:
    """Of one directory."""

    directory: Path  # with the weights
    format: str
    architecture: str
    config: ModelConfig
    described: list[tuple[str, str]]  # by its family: layers, windows, positions, as (label, text)
    parameters: int  # without padding
    dtypes: list[str]
    weight_bytes: int  # of the parameters, as they are stored
    files: list[Path]  # with tensors
    disk_bytes: int  # of everything in `directory`
    tensor_parallel_sizes: list[int]
    tensor_parallel_limit: str  # why no larger ones
    step: int | None = None  # of a training run's checkpoint
    steps: tuple[int, ...] = ()  # that the run has checkpoints of
    holds_optimizer: bool = False
    megatron_core: str | None = None  # that wrote it, or whose format it is
    layout: dict[str, int] | None = None  # that wrote it


def inspect_directory(directory: Path) -> Inspection:
    """A Hugging Face directory, a converted checkpoint, a checkpoint of a training run, or a run (its latest).

    Raises:
        UserError: none of these; another architecture; damaged or foreign files.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: {no_directory(directory)}")
    with open_model(directory) as model:
        hf = read_hf_config(model.source)
        fields = config_fields(hf, model.source / "config.json")
        dtypes = model.dtypes()
        found = Inspection(
            directory=model.directory,
            format="Hugging Face (safetensors)",
            architecture=(hf.get("architectures") or [hf["model_type"]])[0],
            config=model.config,
            described=family_of(hf["model_type"]).describe(fields, hf),
            parameters=model.parameters,
            dtypes=sorted(str(dtype).removeprefix("torch.") for dtype in dtypes),
            weight_bytes=model.parameters * max(dtype.itemsize for dtype in dtypes),
            files=[],
            disk_bytes=sum(path.stat().st_size for path in model.directory.rglob("*") if path.is_file()),
            tensor_parallel_sizes=tensor_parallel_sizes(fields),
            tensor_parallel_limit=_limit(fields),
        )
        if isinstance(model, HuggingFaceModel):
            found.files = sorted(set(model.files.file_of.values()))
            found.weight_bytes = _weight_bytes(model)
        if isinstance(model, MegatronModel):
            _add_checkpoint(found, model)
    return found


def _weight_bytes(model: HuggingFaceModel) -> int:
    """Files of others may mix dtypes."""
    return sum(torch.Size(shape).numel() * model.files.dtype(name).itemsize for name, shape in model.shapes.items())


def _add_checkpoint(found: Inspection, model: MegatronModel) -> None:
    path = model.directory.absolute()
    found.format = "Megatron-Core distributed checkpoint (torch_dist)"
    found.files = sorted(path.glob("*.distcp"))
    found.holds_optimizer = any("optimizer" in key for key in model.checkpoint.tensors)
    if STEP.fullmatch(path.name):
        matches = (STEP.fullmatch(entry.name) for entry in path.parent.iterdir())
        found.steps = tuple(sorted(int(match[1]) for match in matches if match))
    if model.manifest is not None:
        found.step = model.manifest.step if found.steps else None
        found.megatron_core = model.manifest.megatron_core
        found.layout = model.manifest.layout


def _limit(fields: dict[str, Any]) -> str:
    divided = divided_by_tensor_parallelism(fields)
    what = min(divided, key=lambda name: (divided[name], name != "key/value heads"))
    return f"the {divided[what]} {what} must divide into equal, whole shares"
