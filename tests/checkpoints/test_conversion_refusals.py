"""What conversion refuses, in one line; and that an output is whole or absent, whatever happens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sead.errors import UserError
from tests.checkpoints.test_conversion import bits_differ, convert, export, weights_of
from tests.distributed.programs import ROOT, exit_code, run_program


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def hf(hf_dir: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    shutil.copytree(hf_dir, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(hf_dir: Path, tmp_path: Path) -> Path:
    convert(hf_dir, tmp_path / "megatron")
    return tmp_path / "megatron"


def change(directory: Path, name: str, alter: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = alter(tensors[name])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def configure(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[[3, 100, -1]] = torch.tensor([float("nan"), float("-inf"), float("nan")])
    return tensor


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def too_large(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    wide[UP][0, 0] = -1e300
    save_file(wide, directory / "model.safetensors")


def lost_in_the_cache(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    (directory / "chat_template.jinja").symlink_to("../../blobs/0123")


NORM, UP = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: change(d, UP, with_nan), f"{UP} has 3 of 8,192 elements that are NaN or infinite"),
        (lambda d: change(d, NORM, lambda t: t.double()), "must be all bfloat16 or all float32"),
        (too_large, f"{UP} has elements of up to 1e+300, which bfloat16 cannot hold"),
        (lambda d: change(d, NORM, lambda t: t.to(torch.int32)), f"{NORM} is I32; weights must be F64, F32, F16, BF16"),
        (lambda d: change(d, NORM, lambda t: t[:5].clone()), f"{NORM} has shape [5]; its config.json calls for [64]"),
        (pickled, "pytorch_model.bin is not read: it is a pickle"),
        (lambda d: configure(d, model_type="olmo_hybrid"), "model_type='olmo_hybrid' is not supported"),
        (lambda d: configure(d, model_type="mistral"), "model_type='mistral' is not supported; must be olmo3, olmo2"),
        (lambda d: configure(d, tie_word_embeddings=True), "tie_word_embeddings=True: only False is supported"),
        (lost_in_the_cache, "chat_template.jinja: is a link to ../../blobs/0123, which is missing"),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    ],
    ids=[
        "nan",
        "two-dtypes",
        "too-large",
        "integers",
        "misshapen",
        "pickled",
        "hybrid",
        "mistral",
        "tied",
        "lost",
        "no-config",
    ],
)
def test_a_model_that_cannot_be_converted(hf: Path, tmp_path: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(hf)
    dtype = torch.bfloat16 if damage is too_large else None
    assert line in refused(lambda: convert(hf, tmp_path / "out", dtype=dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_all_zero_tensors_are_told(hf: Path, tmp_path: Path) -> None:
    change(hf, UP, torch.zeros_like)
    assert convert(hf, tmp_path / "megatron").all_zero == [UP]
    assert export(tmp_path / "megatron", tmp_path / "back").all_zero == [UP]


class Attack:
    """Runs when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def drop_a_piece(checkpoint: Path) -> None:
    table = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(index for index in table.storage_data if index.fqn == "output_layer.weight")
    del table.storage_data[index]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(table))
    (checkpoint / "manifest.json").unlink()


def truncate_behind_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100_000])


def rename_format(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: (d / ".metadata").write_bytes(b"\x80\x04 not a pickle"), "not a whole checkpoint: .metadata"),
        (remove("__0_0.distcp"), "__0_0.distcp is missing"),
        (truncate_behind_the_manifest, "cannot be read, the file is truncated or damaged"),
        (drop_a_piece, "pieces of output_layer.weight are missing"),
        (rename_format, "the format is zarr 1; only torch_dist 1 can be read"),
        (remove("metadata.json"), "holds no checkpoint; must be a Megatron-Core distributed checkpoint"),
        (remove("config.json"), "holds no config.json; put the model's config.json and tokenizer files into it"),
        (lambda d: configure(d, num_hidden_layers=5, layer_types=None), "has shape [4, 192, 64]; "),
    ],
    ids=["table", "file", "truncated", "piece", "format", "no-format", "no-config", "other-model"],
)
def test_a_checkpoint_that_cannot_be_read(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], line: str
) -> None:
    damage(checkpoint)
    if line.startswith(("the format", "has shape")):
        (checkpoint / "manifest.json").unlink()
    assert line in refused(lambda: export(checkpoint, tmp_path / "back"))
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def test_a_malicious_table_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    message = refused(lambda: export(checkpoint, tmp_path / "back"))
    assert ".metadata: refused: it calls for posix.mkdir, which no checkpoint needs" in message
    assert not (tmp_path / "owned").exists()


def test_a_malicious_piece_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    table = pickle.loads((checkpoint / ".metadata").read_bytes())
    info = next(info for index, info in table.storage_data.items() if index.fqn == "output_layer.weight")
    torch.save(Attack(tmp_path / "owned"), checkpoint / "evil.distcp")
    info.relative_path, info.offset, info.length = "evil.distcp", 0, (checkpoint / "evil.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(table))
    assert "evil.distcp: output_layer.weight cannot be read" in refused(lambda: export(checkpoint, tmp_path / "back"))
    assert not (tmp_path / "owned").exists()


def test_an_output_is_replaced_only_when_asked(hf_dir: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = (checkpoint / ".metadata").stat().st_mtime_ns
    assert "exists; choose another directory" in refused(lambda: convert(hf_dir, checkpoint))
    assert (checkpoint / ".metadata").stat().st_mtime_ns == before
    convert(hf_dir, checkpoint, overwrite=True)
    assert (checkpoint / ".metadata").stat().st_mtime_ns != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    assert "was not written by this tool" in refused(lambda: convert(hf_dir, tmp_path / "thesis", overwrite=True))
    assert (tmp_path / "thesis/chapter").exists()


def test_the_old_output_stays_when_the_new_one_fails(hf: Path, checkpoint: Path) -> None:
    change(hf, UP, with_nan)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    refused(lambda: convert(hf, checkpoint, overwrite=True))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_room_is_looked_for_before_anything_is_written(
    hf_dir: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr("megatron_sead.checkpoints.torch_dist_writer.TorchDistWriter.announce", None)  # not reached
    for action in (lambda: convert(hf_dir, tmp_path / "out"), lambda: export(checkpoint, tmp_path / "out")):
        assert "out: needs 0.1 GB and 0.0 GB are free there" in refused(action)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_leaves_nothing(
    hf_dir: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_sead.checkpoints.torch_dist_writer.TorchDistWriter.add_object", refuse)
    monkeypatch.setattr("megatron_sead.checkpoints.shard_writer._write_all", refuse)
    for action in (lambda: convert(hf_dir, tmp_path / "out"), lambda: export(checkpoint, tmp_path / "out")):
        assert "cannot be written (No space left on device)" in refused(action)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def convert_and_die(direction: str, source: Path, output: Path) -> None:
    """Killed when it adds rows for the 20th time."""
    from megatron_sead.checkpoints import conversion, shard_writer, torch_dist_writer

    calls: list[int] = []

    def die_after(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)

        return wrapper

    for writer in (torch_dist_writer.TorchDistWriter, shard_writer.ShardWriter):
        writer.add_rows = die_after(writer.add_rows)
    getattr(conversion, direction)(source, output)


@pytest.mark.parametrize("direction", ["huggingface_to_megatron", "megatron_to_huggingface"])
def test_a_killed_conversion_leaves_nothing_under_its_name(
    hf_dir: Path, checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    source, run = (hf_dir, convert) if direction == "huggingface_to_megatron" else (checkpoint, export)
    assert exit_code(convert_and_die, direction, source, tmp_path / "out") == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.glob(".*")] == [".out.tmp"]
    run(source, tmp_path / "out")  # again: starts clean
    assert not list(tmp_path.glob(".*"))
    if run is convert:
        export(tmp_path / "out", tmp_path / "back")
    back = tmp_path / "back" if run is convert else tmp_path / "out"
    assert bits_differ(weights_of(back), weights_of(hf_dir)) == []


def test_the_command_converts_and_ends_a_mistake_in_one_line(hf_dir: Path, tmp_path: Path) -> None:
    tool = ROOT / "tools" / "convert_checkpoint.py"
    there = subprocess.run(
        [sys.executable, tool, "hf-to-megatron", "--input", hf_dir, "--output", tmp_path / "m", "--dtype", "bf16"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (there.returncode, there.stderr) == (0, ""), there.stderr
    assert "47 tensors" in there.stdout and "in bf16" in there.stdout
    back = run_program(tool, "megatron-to-hf", "--input", str(tmp_path / "m"), "--output", str(tmp_path / "b"))
    assert (back.returncode, back.stderr) == (0, ""), back.stderr
    wrong = run_program(tool, "megatron-to-hf", "--input", str(hf_dir), "--output", str(tmp_path / "c"))
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
    assert wrong.stderr.startswith(f"error: {hf_dir}: holds no checkpoint; must be")


def test_a_directory_with_both_formats_is_refused(hf_dir: Path, checkpoint: Path) -> None:
    from megatron_sead.checkpoints.model_files import HuggingFaceModel, open_model

    shutil.copy(hf_dir / "model.safetensors", checkpoint)
    assert "holds safetensors and a Megatron-Core checkpoint" in refused(lambda: open_model(checkpoint))
    (checkpoint / ".metadata").unlink()  # metadata.json alone may be anybody's
    assert isinstance(open_model(checkpoint), HuggingFaceModel)


def test_new_weights_beside_an_old_index_are_not_converted(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
    message = refused(lambda: convert(hf, tmp_path / "out"))
    assert "holds model.safetensors, and model.safetensors.index.json names model-1.safetensors" in message
