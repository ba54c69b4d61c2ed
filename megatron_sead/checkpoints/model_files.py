"""A model on disk, in either format, behind one interface: read one weight, one layer or one tensor, the rest stays.

with open_model(directory) as model:
    for weight in model.weights:
        parts = model.read(weight)  # its Hugging Face tensors, whole
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from megatron_sead.checkpoints.finding import find_checkpoint
from megatron_sead.checkpoints.manifest import Damage, Manifest, read_manifest
from megatron_sead.checkpoints.torch_dist_reader import SavedTensor, TorchDistCheckpoint
from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.models.config import ModelConfig
from megatron_sead.models.family import family_of, read_config_fields
from megatron_sead.models.tensor_files import TensorFiles
from megatron_sead.models.weight_files import has_weights
from megatron_sead.models.weights import NamedWeight, named_weights, tensor_shapes


def model_weights(hf_dir: Path) -> tuple[ModelConfig, list[NamedWeight]]:
    """Configuration and weights of the model that ``config.json`` describes, in Hugging Face's order.

    Raises:
        UserError: no config.json, another architecture, or a value that this family does not have.
    """
    fields = read_config_fields(hf_dir)
    config = family_of(fields["model_type"]).implementation().config(**fields)
    return config, list(named_weights(config))


class ModelFiles(ABC):
    """Common to both formats. A context manager.

    Attributes:
        directory: with the weights.
        source: directory with config.json and tokenizer files.
        config: the architecture.
        weights: in Hugging Face's order.
        remedy: of the error about weights of several types.
    """

    remedy: str | None = None

    def __init__(self, directory: Path, source: Path) -> None:
        self.directory = directory
        self.source = source
        self.config, self.weights = model_weights(source)
        self._weight_of = {name: (named, i) for named in self.weights for i, name in enumerate(named.names)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every Hugging Face tensor, in order."""
        return tensor_shapes(self.weights)

    @property
    def parameters(self) -> int:
        """How many, without padding."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @abstractmethod
    def dtypes(self) -> set[torch.dtype]:
        """Of the weights as they are stored. Reads no weight."""

    @abstractmethod
    def read(self, named: NamedWeight) -> list[torch.Tensor]:
        """The Hugging Face tensors of one weight, whole, in the dtype that they are stored in.

        Raises:
            UserError: damaged files.
        """

    def check_repeated(self) -> None:  # noqa: B027 (a checkpoint has none)
        """Tensors that are there under two names are the same. Raises UserError."""

    def tensor(self, name: str) -> torch.Tensor:
        """One Hugging Face tensor. `read` is cheaper for all of a weight's."""
        named, i = self._weight_of[name]
        return self.read(named)[i]

    def single_dtype(self) -> torch.dtype:
        """
        Raises:
            UserError: there are several, or one that is not trained in.
        """
        found = self.dtypes()
        if len(found) == 1 and found <= {torch.float32, torch.bfloat16}:
            return found.pop()
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise UserError(f"{self.directory}: holds {names}; must be all bfloat16 or all float32", remedy=self.remedy)


class HuggingFaceModel(ModelFiles):
    """A directory with config.json and safetensors.

    Raises:
        UserError: damaged files; tensors that are missing, unknown or misshapen.
    """

    remedy = "dtype"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, directory)
        self.files = TensorFiles(directory)

    def __enter__(self) -> Self:
        self.files.__enter__()
        self.files.check(self.weights)
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.__exit__(*exc)

    def dtypes(self) -> set[torch.dtype]:
        return {self.files.dtype(name) for named in self.weights for name in named.names}

    def check_repeated(self) -> None:
        self.files.check_repeated()

    def read(self, named: NamedWeight) -> list[torch.Tensor]:
        return [self.files.read(name) for name in named.names]


class MegatronModel(ModelFiles):
    """A torch_dist checkpoint: converted, or of a training run under any layout. The weights alone are looked at.

    Args:
        directory: of the checkpoint itself; `find_checkpoint` finds it.

    Attributes:
        manifest: what wrote it, at which step; None when other software did.

    Raises:
        UserError: not a whole checkpoint, or of another model than its config.json.
    """

    def __init__(self, directory: Path) -> None:
        self.checkpoint = TorchDistCheckpoint(directory)
        super().__init__(directory, find_model_source(directory))
        self.manifest = _manifest(directory)
        self._check()

    def _check(self) -> None:
        for named in self.weights:
            saved, key = self._saved(named), megatron_key(named)
            whole = named.weight.whole_shape
            expected = whole if named.layer is None else (self.config.num_layers, *whole)
            padded = (
                named.weight.padded_rows is not None and saved.shape[0] >= whole[0] and saved.shape[1:] == whole[1:]
            )
            if saved.shape != expected and not padded:
                raise UserError(
                    f"{self.directory}: {key} has shape {list(saved.shape)}; {self.source / 'config.json'} calls for "
                    f"{list(expected)}"
                )

    def _saved(self, named: NamedWeight) -> SavedTensor:
        key = megatron_key(named)
        if key not in self.checkpoint.tensors:
            raise UserError(f"{self.directory}: tensors are missing: {key}, of {named.names[0]}")
        return self.checkpoint.tensors[key]

    def dtypes(self) -> set[torch.dtype]:
        return {self._saved(named).dtype for named in self.weights}

    def read(self, named: NamedWeight) -> list[torch.Tensor]:
        parts = named.weight.split(self.checkpoint.read(megatron_key(named), named.layer))
        return [part[: shape[0]] for part, shape in zip(parts, named.weight.shapes, strict=True)]

    def rows(self, named: NamedWeight) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(Hugging Face name, first row, rows) of one weight, in the order of the files, a written piece at a time.

        Pieces of columns are put together first. Errors as `read` has.
        """
        key = megatron_key(named)
        if any(piece.sizes[-1] != self._saved(named).shape[-1] for piece in self._saved(named).pieces):
            yield from ((name, 0, part) for name, part in zip(named.names, self.read(named), strict=True))
            return
        spans = named.weight.row_spans()
        for (row, *_), piece in self.checkpoint.pieces(key, named.layer):
            for span in spans:
                if (found := span.overlap(row, len(piece))) is not None:
                    of_piece, first = found
                    yield named.names[span.part], first, piece[of_piece]


def megatron_key(named: NamedWeight) -> str:
    """Megatron's key of a weight in a checkpoint: the layers of a model share one, stacked along a leading axis."""
    return named.weight.megatron if named.layer is None else f"decoder.layers.{named.weight.megatron}"


def open_model(directory: Path, iteration: int | None = None) -> ModelFiles:
    """Whichever of the two formats `directory` is in.

    Args:
        iteration: of a training run; None: the latest.

    Raises:
        UserError: neither, or both.
    """
    is_checkpoint = (directory / "metadata.json").exists()
    if is_checkpoint and has_weights(directory) and (directory / ".metadata").exists():
        raise UserError(
            f"{directory}: holds safetensors and a Megatron-Core checkpoint (.metadata): it is ambiguous which is the "
            "model; keep them in two directories"
        )
    if has_weights(directory) or (any(directory.glob("*.safetensors*")) and not is_checkpoint):
        return HuggingFaceModel(directory)
    return MegatronModel(find_checkpoint(directory, iteration))


def _manifest(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except Damage:
        return None


def find_model_source(checkpoint: Path) -> Path:
    """Where the Hugging Face configuration and tokenizer of a checkpoint are: beside it, or where its run began.

    Raises:
        UserError: nowhere.
    """
    if (checkpoint / "config.json").exists():
        return checkpoint
    student = recorded_student(checkpoint)
    run = _run_of(checkpoint)
    for place in [*([] if student is None else [student.path]), run / "student-hf"]:
        if (place / "config.json").exists():
            return place
    tried = ""
    if student is not None:
        where = "" if student.path.is_absolute() else f", looked for from {Path.cwd()}"
        tried = f"; {run / 'config.yaml'} names {student.path}{where}, which holds none"
    raise UserError(
        f"{checkpoint}: holds no config.json{tried}; put the model's config.json and tokenizer files into it"
    )


def recorded_student(checkpoint: Path) -> ModelSettings | None:
    """The student's settings in the run that wrote a checkpoint, as the run recorded them; None: there is no record,
    or the checkpoint brings its own config.json.

    Raises:
        UserError: the record does not say where the student is.
    """
    recorded = _run_of(checkpoint) / "config.yaml"
    if (checkpoint / "config.json").exists() or not recorded.exists():
        return None
    try:
        student: Any = yaml.safe_load(recorded.read_text(encoding="utf-8"))["student"]
        return ModelSettings(**{name: student[name] for name in ModelSettings.model_fields if name in student})
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(f"{recorded}: does not say student.path, where the model's config.json is") from None


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent
