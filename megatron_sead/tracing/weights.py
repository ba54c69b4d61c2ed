"""Weights of a model whose config.json alone is there: every tensor that it calls for, on the fake host."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from megatron_sead.models.tensor_files import TensorFiles, WeightWithNames


class DeclaredWeights(TensorFiles):
    """Stands for the files of a directory: bf16 tensors of the shapes that the model asks for."""

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = hf_dir
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> DeclaredWeights:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def check(self, weights: Collection[WeightWithNames]) -> None:
        """Nothing can be missing."""
        for named in weights:
            self._shapes |= zip(named.names, named.weight.shapes, strict=True)

    def check_repeated(self) -> None:
        """Nothing is there twice."""

    def slice(self, name: str) -> Any:
        return _Slice(self._shapes[name])


class _Slice:
    """As safetensors' own: of the file, which is no memory, until a part is asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, part: Any) -> torch.Tensor:
        with torch.device("meta"):
            shape = torch.empty(self._shape)[part].shape
        return torch.empty(shape, dtype=torch.bfloat16, device="cpu")
