"""Which files are the model: those that transformers and vLLM both load, or a line that names what is in doubt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.models.weight_files import INDEX, ITEM_BYTES, SINGLE, locate_tensors, weight_files
from megatron_sead.planning.preflight import _damaged_weights, _missing_weights

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(file: Path, names: str, dtype: str = "F32", *, shape: tuple[int, ...] = (2,), more: bytes = b"") -> None:
    """A safetensors file with a tensor of two elements a letter."""
    size = 2 * ITEM_BYTES.get(dtype, 1)
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size * len(names)) + more)


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_shards(directory: Path) -> None:
    write(directory / ONE, "a")
    write(directory / TWO, "b")
    write_index(directory, {"a": ONE, "b": TWO})


def found(directory: Path) -> dict[str, str]:
    return {name: place.file.name for name, place in locate_tensors(directory).items()}


def test_one_file(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, "ab")
    assert found(tmp_path) == {"a": SINGLE, "b": SINGLE}
    write_index(tmp_path, {"a": SINGLE, "b": SINGLE})  # says the same
    assert found(tmp_path) == {"a": SINGLE, "b": SINGLE}


def test_shards_and_files_that_nobody_loads(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write(tmp_path / "consolidated.safetensors", "other")
    write(tmp_path / "model.fp16.safetensors", "ab", "F16")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert found(tmp_path) == {"a": ONE, "b": TWO}
    assert weight_files(tmp_path) == [tmp_path / ONE, tmp_path / TWO]


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_floating_tensors(dtype: str, tmp_path: Path) -> None:
    write(tmp_path / SINGLE, "a", dtype)
    assert locate_tensors(tmp_path)["a"].dtype == dtype


def shards_and(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(directory: Path) -> None:
        write_shards(directory)
        change(directory)

    return both


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one file beside shards": (
        shards_and(lambda d: write(d / SINGLE, "ab")),
        f"holds {SINGLE}, and {INDEX} names {ONE}: transformers would load the first",
    ),
    "an index of another count": (
        shards_and(lambda d: write(d / "model-00003-of-00003.safetensors", "a")),
        f"holds model-00003-of-00003.safetensors, which {INDEX} does not name",
    ),
    "shards beside one file": (
        lambda d: (write(d / SINGLE, "ab"), write(d / ONE, "a")),
        f"holds {ONE}, beside {SINGLE} and without an index",
    ),
    "a tensor twice": (shards_and(lambda d: write(d / TWO, "ab")), f"{TWO}: holds tensor a, which"),
    "a tensor that the index lacks": (shards_and(lambda d: write(d / TWO, "bc")), f"{TWO}: holds tensor c, of which"),
    "a tensor that only the index has": (shards_and(lambda d: write(d / TWO, "")), f"{TWO}: tensor b is missing"),
    "an adapter": (
        shards_and(lambda d: (d / "adapter_config.json").write_text("{}")),
        "holds adapter_config.json: transformers would load an adapter",
    ),
    "a parent directory": (lambda d: write_index(d, {"a": "../x.safetensors"}), "places a in '../x.safetensors'"),
    "an absolute path": (lambda d: write_index(d, {"a": "/x.safetensors"}), "places a in '/x.safetensors'"),
    "a pickle in the index": (lambda d: write_index(d, {"a": "x.bin"}), "places a in 'x.bin': must be"),
    "a number in the index": (lambda d: write_index(d, {"a": 3}), f"{INDEX}: not a safetensors index"),
    "an empty index": (lambda d: write_index(d, {}), f"{INDEX}: not a safetensors index"),
    "a list in the index": (lambda d: write_index(d, ["a"]), f"{INDEX}: not a safetensors index"),
    "null in the index": (lambda d: write_index(d, None), f"{INDEX}: not a safetensors index"),
    "an index that is a list": (lambda d: (d / INDEX).write_text("[]"), f"{INDEX}: not a safetensors index"),
    "an index that is null": (lambda d: (d / INDEX).write_text("null"), f"{INDEX}: not a safetensors index"),
    "an index that is cut off": (lambda d: (d / INDEX).write_text("{"), f"{INDEX}: not a safetensors index"),
    "integers": (lambda d: write(d / SINGLE, "a", "I32"), "a is I32; weights must be F64, F32, F16, BF16"),
    "bytes": (lambda d: write(d / SINGLE, "a", "I8"), "a is I8; weights must be"),
    "booleans": (lambda d: write(d / SINGLE, "a", "BOOL"), "a is BOOL; weights must be"),
    "eight bits": (lambda d: write(d / SINGLE, "a", "F8_E4M3"), "a is F8_E4M3; weights must be"),
    "another shape": (lambda d: write(d / SINGLE, "a", shape=(3,)), "a has 8 bytes, which its shape [3] does not"),
    "bytes too many": (lambda d: write(d / SINGLE, "a", more=b"123"), "not a whole safetensors file (truncated: "),
    "no bytes": (lambda d: (d / SINGLE).write_bytes(b""), "not a whole safetensors file (truncated: 0 bytes"),
    "a list as header": (
        lambda d: (d / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]"),
        "not a whole safetensors file (its header is damaged)",
    ),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_in_doubt_or_damaged_is_told_before_a_run_too(
    damage: Callable[[Path], object], line: str, tmp_path: Path
) -> None:
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        locate_tensors(tmp_path)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert any(line in problem for problem in _damaged_weights(ModelSettings(path=tmp_path)))


def test_shards_without_an_index_are_no_model(tmp_path: Path) -> None:
    write(tmp_path / ONE, "a")
    with pytest.raises(UserError, match=f"holds neither .*; {ONE} alone does not say which files are the model"):
        locate_tensors(tmp_path)


def test_shards_that_may_come_later_are_named(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": ONE, "b": TWO})
    write(tmp_path / ONE, "a")
    model = ModelSettings(path=tmp_path)
    assert _missing_weights(model, "student") == [f"student.path={tmp_path}: {TWO} not found"]
    assert _damaged_weights(model) == []
    write(tmp_path / ONE, "a", "I8")
    assert "a is I8" in _damaged_weights(model)[0]
    with pytest.raises(UserError, match=f"{TWO}: missing, but .* names it|a is I8"):
        locate_tensors(tmp_path)
