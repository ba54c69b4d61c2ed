"""A data set may be a folder: of shards, or as datasets saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.folders import require_outside
from megatron_sead.prompts.rows import read_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "more": {"level": i}} for i in range(6)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, **changes: str) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(PromptSettings(path=str(path), **changes))]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_shards_are_read_in_order_and_only_those_of_the_split(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "data" / f"train-00001-of-00002{suffix}", ROWS[3:5])
    write(tmp_path / "data" / f"train-00000-of-00002{suffix}", ROWS[:3])
    write(tmp_path / "data" / f"test-00000-of-00001{suffix}", ROWS[5:])
    write(tmp_path / ".cache" / f"train-00000-of-00002{suffix}", ROWS)
    (tmp_path / "README.md").write_text("a data set")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(tmp_path) == ROWS[:5]
    assert read(tmp_path, split="test") == ROWS[5:]
    rows = read_rows(PromptSettings(path=str(tmp_path)))
    assert rows[3].place.rpartition(",")[0] == str(tmp_path / "data" / f"train-00001-of-00002{suffix}")
    with pytest.raises(UserError, match=r"holds data/test-00000-of-00001\S+, and no file of the split 'dev'$"):
        read(tmp_path, split="dev")


def test_files_whose_names_tell_no_split_are_all_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "testimony.jsonl", ROWS[2:])
    assert read(tmp_path) == ROWS


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    DatasetDict(train=data.select(range(4)), test=data.select([5])).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == ROWS
    assert (read(tmp_path / "two"), read(tmp_path / "two", split="test")) == (ROWS[:4], ROWS[5:])
    assert read_rows(PromptSettings(path=str(tmp_path / "one")))[4].place == f"{tmp_path / 'one'}, row 5"
    with pytest.raises(UserError, match=r"two: has no split 'dev'; it has 'train', 'test'$"):
        read(tmp_path / "two", split="dev")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"^prompts.path=.*/one: .* cannot be loaded: [^\n]+$"):
        read(tmp_path / "one")


def test_a_folder_that_is_no_data_set_is_told_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "none" / "rows.csv", ROWS)
    with pytest.raises(UserError, match=r"^prompts.path=\S+/none: is a directory without data files; must hold"):
        read(tmp_path / "none")
    write(tmp_path / "both" / "a.parquet", ROWS)
    write(tmp_path / "both" / "b.jsonl", ROWS)
    with pytest.raises(UserError, match=r"both: holds both a.parquet and b.jsonl; name a file"):
        read(tmp_path / "both")
    write(tmp_path / "torn" / "a.jsonl", ROWS)
    (tmp_path / "torn" / "b.jsonl").write_text("")
    with pytest.raises(UserError, match=r"^prompts.path=\S+/torn/b.jsonl: holds no prompts: the file is empty"):
        read(tmp_path / "torn")


def test_nothing_is_written_among_the_files_of_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"^output=\S+: lies in input=\S+/data, a folder whose files are read"):
        require_outside(tmp_path / "data" / "out" / "b.jsonl", str(tmp_path / "data"), "input")
    require_outside(tmp_path / "b.jsonl", str(tmp_path / "data"), "input")
    require_outside(tmp_path / "data" / "b.jsonl", str(tmp_path / "data" / "a.jsonl"), "input")
