"""Weights go in and come back bit for bit under any layout; a rank reads its slices; damaged directories are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.ranks import RankPool
from tests.models.parity import Layout
from tests.models.test_model_config import refusal


def round_trip(hf_dir: Path, layout: Layout, precision: str = "fp32") -> list[str]:
    """What is wrong with what comes back, compared on this rank."""
    from megatron_sead.models.builder import build_model
    from megatron_sead.models.huggingface import iterate_huggingface_weights
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(layout.settings(), "cpu", seed=0)
    chunks = build_model(hf_dir, parallel, precision=precision, sequence_parallel=layout.sp)
    expected = load_file(hf_dir / "model.safetensors")
    wrong, seen = [], []
    for name, tensor in iterate_huggingface_weights(chunks, parallel):
        seen.append(name)
        if not torch.equal(tensor, expected[name].to(tensor.dtype)):
            wrong.append(name)
    destroy_parallel(keep_world=True)
    wrong += [f"{name} came {seen.count(name)} times" for name in expected if seen.count(name) != 1]
    return wrong


@pytest.mark.mcore_lane
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(pp=4), Layout(pp=2, vpp=2), Layout(tp=2, pp=2, vpp=2)],
    ids=str,
)
def test_weights_come_back_bit_for_bit(ranks: RankPool, hf_dir: Path, layout: Layout) -> None:
    assert ranks.run(round_trip, hf_dir, layout) == [[], [], [], []]


def test_bf16_rounds_once_and_comes_back(ranks: RankPool, hf_dir: Path) -> None:
    assert ranks.run(round_trip, hf_dir, Layout(tp=2), precision="bf16") == [[], [], [], []]


@pytest.mark.parametrize("stored", [torch.float16, torch.float64], ids=str)
def test_other_floating_types_are_loaded(ranks: RankPool, hf_dir: Path, tmp_path: Path, stored: torch.dtype) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    tensors = {name: tensor.to(stored) for name, tensor in load_file(hf_dir / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert ranks.run(round_trip, tmp_path, Layout(tp=2)) == [[], [], [], []]


def test_several_files_behind_an_index(ranks: RankPool, hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    split_files(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    shutil.copy(hf_dir / "model.safetensors", tmp_path / "whole.safetensors")
    found = ranks.run(sums, tmp_path)
    assert found[0] == pytest.approx(
        sum(t.double().sum().item() for t in load_file(hf_dir / "model.safetensors").values())
    )


def sums(hf_dir: Path) -> float:
    from megatron_sead.models.builder import build_model
    from megatron_sead.models.huggingface import iterate_huggingface_weights
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(Layout(tp=2, pp=2).settings(), "cpu", seed=0)
    chunks = build_model(hf_dir, parallel, precision="fp32")
    total = sum(tensor.double().sum().item() for _, tensor in iterate_huggingface_weights(chunks, parallel))
    destroy_parallel(keep_world=True)
    return total


def split_files(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2 + 1}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _change(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def missing(directory: Path) -> None:
    _change(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def unknown(directory: Path) -> None:
    _change(directory, lambda tensors: tensors.update({"model.layers.4.extra": torch.zeros(2)}))


def misshapen(directory: Path) -> None:
    _change(directory, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 64)}))


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def absent(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def file_of_the_index_absent(directory: Path) -> None:
    split_files(directory)
    (directory / "model-2.safetensors").unlink()


def file_of_the_index_truncated(directory: Path) -> None:
    split_files(directory)
    file = directory / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def broken_index(directory: Path) -> None:
    split_files(directory)
    (directory / "model.safetensors.index.json").write_text("{}")


def index_names_the_wrong_file(directory: Path) -> None:
    split_files(directory)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}
    weight_map["lm_head.weight"] = other[weight_map["lm_head.weight"]]
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (missing, "tensors are missing: model.layers.1.mlp.up_proj.weight"),
        (unknown, "tensors that its config.json does not call for: model.layers.4.extra"),
        (misshapen, "lm_head.weight has shape [7, 64]; its config.json calls for [6"),
        (truncated, "model.safetensors: not a whole safetensors file"),
        (empty, "model.safetensors: not a whole safetensors file"),
        (absent, "holds neither model.safetensors nor"),
        (file_of_the_index_absent, "model-2.safetensors: missing, but"),
        (file_of_the_index_truncated, "model-2.safetensors: not a whole safetensors file"),
        (broken_index, "index.json: not a safetensors index"),
        (index_names_the_wrong_file, "holds tensor lm_head.weight, which "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_directory_is_told_in_one_line_on_every_rank(
    ranks: RankPool, hf_dir: Path, tmp_path: Path, damage: Callable[[Path], None], line: str
) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    found = ranks.run(refusal, tmp_path, Layout(tp=2, pp=2))
    assert all(line in message and "\n" not in message for message in found), found


def test_a_rank_reads_its_slices_alone(ranks: RankPool, hf_dir: Path) -> None:
    whole = sum(tensor.numel() for name, tensor in load_file(hf_dir / "model.safetensors").items())
    by_rank = ranks.run(numbers_read, hf_dir, Layout(tp=2, pp=2))
    assert max(by_rank) < 0.3 * whole
    assert sum(by_rank) < 1.05 * whole  # norms are read by every tensor-parallel rank


def numbers_read(hf_dir: Path, layout: Layout) -> int:
    from unittest import mock

    from megatron_sead.models import huggingface
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    counted = 0
    slice_of = huggingface.TensorFiles.slice

    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_shape(self) -> Any:
            return self.inner.get_shape()

        def __getitem__(self, index: Any) -> torch.Tensor:
            nonlocal counted
            part = self.inner[index]
            counted += part.numel()
            return part

    parallel = initialize_parallel(layout.settings(), "cpu", seed=0)
    with mock.patch.object(huggingface.TensorFiles, "slice", lambda files, name: Counting(slice_of(files, name))):
        build_model(hf_dir, parallel, precision="fp32")
    destroy_parallel(keep_world=True)
    return counted
