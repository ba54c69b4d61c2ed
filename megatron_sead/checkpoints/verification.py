"""Are two directories the same model? Every tensor by its hash, one in memory at a time; the configuration by what it
means; and a model that goes to Megatron's format and back."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_sead.checkpoints.conversion import Advance, Conversion, huggingface_to_megatron, megatron_to_huggingface
from megatron_sead.checkpoints.huggingface import COMPANIONS
from megatron_sead.checkpoints.model_files import HuggingFaceModel, ModelFiles
from megatron_sead.checkpoints.read_ahead import read_ahead
from megatron_sead.errors import ArgumentError
from megatron_sead.files.names import TOKENIZER_SETTINGS, no_directory
from megatron_sead.models.family import read_config_fields, read_hf_config
from megatron_sead.models.token_ids import portable_tokenizer

# Keys of config.json that say in several forms what `config_fields` says in one, and those that say who wrote the file
REWRITTEN = {"rope_theta", "rope_scaling", "rope_parameters", "layer_types", "dtype", "torch_dtype"}
REWRITTEN |= {"transformers_version"}
DERIVED = ("window_size", "window_attn_skip_freq")  # of `config_fields`: from others of them
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """Where a tensor is not what it should be."""

    name: str
    different: int  # elements, by their bits
    elements: int
    first: tuple[int, ...]  # place of the first one
    expected: float
    found: float
    largest: float  # absolute difference

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.different:,} of {self.elements:,} elements differ, the first at {list(self.first)} "
            f"({self.found:.9g} for {self.expected:.9g}), by at most {self.largest:.3g}"
        )


@dataclass
class TensorComparison:
    """Of all tensors of two models."""

    tensors: int = 0
    bytes: int = 0  # as compared
    fingerprint: str = ""  # SHA-256 of every tensor's name, dtype, shape and SHA-256, in Hugging Face's order
    rounded: tuple[str, str] | None = None  # dtypes, where the first was converted to the second before comparing
    differences: list[TensorDifference] = field(default_factory=list)


def compare_tensors(expected: ModelFiles, found: ModelFiles, advance: Advance | None = None) -> TensorComparison:
    """Every tensor of `found` against `expected`'s, in the dtype of `found`.

    Args:
        expected: opened, of either format; `found` likewise, of the same shapes (`meaning_differences` is empty).
        advance: is told the bytes done, of how many.

    Raises:
        UserError: damaged files.
    """
    for model in (expected, found):
        model.check_repeated()
    pairs = ((named, expected.read(named), found.read(named)) for named in expected.weights)
    comparison, total = TensorComparison(), hashlib.sha256()
    everything = sum(torch.Size(shape).numel() for shape in expected.shapes.values())
    for named, wanted, there in read_ahead(pairs):
        for name, a, b in zip(named.names, wanted, there, strict=True):
            if a.dtype != b.dtype:
                comparison.rounded = (str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch."))
                a = a.to(b.dtype)
            digest = _digest(a)
            if digest != _digest(b):
                comparison.differences.append(_difference(name, a, b))
            total.update(f"{name} {a.dtype} {list(a.shape)} {digest}\n".encode())
            comparison.tensors += 1
            comparison.bytes += a.nbytes
            if advance:
                advance(comparison.bytes, everything * a.itemsize)
    comparison.fingerprint = total.hexdigest()
    return comparison


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor) -> TensorDifference:
    bits = BITS[expected.itemsize]  # so that a NaN equals itself, and -0 is not 0
    differs = expected.contiguous().view(bits) != found.contiguous().view(bits)
    flat = int(differs.reshape(-1).to(torch.uint8).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape))
    largest = max(
        float((a.double() - b.double()).abs().max())
        for a, b in zip(expected.split(1024), found.split(1024), strict=True)  # rows: fp64 of all would be 4 times it
    )
    return TensorDifference(
        name, int(differs.sum()), differs.numel(), place, float(expected[place]), float(found[place]), largest
    )


def meaning_differences(expected: Path, found: Path) -> list[str]:
    """What two config.json say differently about the model itself, whatever the form they say it in.

    Raises:
        UserError: one of them is of no family here.
    """
    a, b = (read_config_fields(path) for path in (expected, found))
    return [f"{key}: {b.get(key)} for {a[key]}" for key in a if a[key] != b.get(key) and key not in DERIVED]


def _other_differences(expected: Path, found: Path) -> list[str]:
    """The rest of config.json: what was there is there still, the same."""
    a, b = read_hf_config(expected), read_hf_config(found)
    return [f"{key}: {b.get(key)!r} for {a[key]!r}" for key in a if key not in REWRITTEN and a[key] != b.get(key)]


@dataclass
class RoundTrip:
    """A model that went to Megatron's format and back."""

    outward: Conversion
    outward_seconds: float
    back_seconds: float
    tensors: TensorComparison
    config: list[str]  # differences
    companions: list[str]  # files that were kept
    damaged_companions: list[str]  # files that are missing or have changed

    @property
    def exact(self) -> bool:
        return not (self.tensors.differences or self.config or self.damaged_companions)


def round_trip(source: Path, workdir: Path | None = None, advance: Advance | None = None) -> RoundTrip:
    """Convert there and back in a temporary folder, and compare every bit. Leaves nothing behind.

    Args:
        source: Hugging Face directory.
        workdir: with room for two copies of the model; None: the folder that `source` is in.
        advance: is told the bytes done, of how many: of both conversions and the comparison.

    Raises:
        UserError: what conversion raises; `workdir` cannot be written, or has no room.
    """
    with HuggingFaceModel(source) as model, _folder(workdir or source.absolute().parent, model) as folder:
        steps = _thirds(advance)
        began = time.monotonic()
        outward = huggingface_to_megatron(source, folder / "megatron", advance=steps[0])
        turned = time.monotonic()
        megatron_to_huggingface(folder / "megatron", folder / "back", advance=steps[1])
        ended = time.monotonic()
        with HuggingFaceModel(folder / "back") as back:
            tensors = compare_tensors(model, back, steps[2])
        config = meaning_differences(source, folder / "back") + _other_differences(source, folder / "back")
        kept = [name for name in _companion_files(source) if _same_file(source / name, folder / "back" / name)]
        damaged = [name for name in _companion_files(source) if name not in kept]
    return RoundTrip(outward, turned - began, ended - turned, tensors, config, kept, damaged)


def _thirds(advance: Advance | None) -> list[Advance | None]:
    if advance is None:
        return [None] * 3

    def step(number: int) -> Advance:
        return lambda done, total: advance(number * total + done, 3 * total)

    return [step(number) for number in range(3)]


@contextmanager
def _folder(workdir: Path, model: ModelFiles) -> Iterator[Path]:
    if not workdir.is_dir():
        raise ArgumentError("workdir", workdir, no_directory(workdir))
    needed, free = 2 * model.parameters * model.single_dtype().itemsize, shutil.disk_usage(workdir).free
    if free < needed:
        raise ArgumentError(
            "workdir",
            workdir,
            f"there and back takes {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free there; choose another disk",
        )
    try:
        folder = Path(tempfile.mkdtemp(prefix=".roundtrip-", dir=workdir))
    except OSError as error:
        raise ArgumentError("workdir", workdir, f"cannot be written ({error.strerror}); choose another place") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _companion_files(source: Path) -> list[str]:
    """Relative names, those in subfolders too."""
    found = [source / name for name in COMPANIONS if (source / name).exists()]
    files = [file for path in found for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [str(file.relative_to(source)) for file in files if file.is_file()]


def _same_file(a: Path, b: Path) -> bool:
    if not b.is_file():
        return False
    if a.read_bytes() == b.read_bytes():
        return True
    if a.name != TOKENIZER_SETTINGS:
        return False
    ours, theirs = (json.loads(file.read_text(encoding="utf-8")) for file in (a, b))
    return bool(portable_tokenizer(ours) == theirs)
