"""Benchmarks as they are released, from files and folders; names and places that cannot be meant are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from megatron_sead.evaluation.benchmarks import BENCHMARKS, BOXED, PAPER, choose_benchmarks, read_benchmark


@pytest.mark.parametrize(
    ("name", "row", "answers"),
    [
        ("math500", {"problem": "p", "solution": r"\boxed{3}", "answer": "2", "unique_id": "t/1"}, ("2",)),
        ("math500", {"prompt": "p", "ground_truth": "2"}, ("2",)),
        ("minerva_math", {"problem": "p", "solution": r"\boxed{1} \boxed{1.6} cm", "type": "x", "idx": 0}, ("1.6",)),
        ("minerva_math", {"question": "p", "answer": "1.6"}, ("1.6",)),
        ("olympiadbench", {"id": 7, "question": "p", "solution": ["s"], "final_answer": ["$2$"]}, ("$2$",)),
        ("olympiadbench", {"question": "p", "final_answer": ["1", "2"], "difficulty": "hard"}, ("1", "2")),
        ("amc23", {"id": 0, "problem": "p", "answer": 27.0, "question": "p"}, ("27",)),
        ("aime24", {"id": 60, "problem": "p", "solution": r"\boxed{3}", "answer": "204"}, ("204",)),
        ("aime24", {"id": 60, "problem": "p", "solution": r"so \boxed{204}"}, ("204",)),
        ("aime25", {"problem_idx": 1, "problem": "p", "answer": 70}, ("70",)),
        ("gsm8k", {"question": "p", "answer": "9*2=<<9*2=18>>18\n#### 18"}, ("18",)),
    ],
)
def test_each_release_is_read_by_its_own_fields(
    tmp_path: Path, name: str, row: dict[str, object], answers: tuple[str, ...]
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_text(json.dumps(row) + "\n")
    [benchmark] = choose_benchmarks([name], tmp_path)
    _, [found], _ = read_benchmark(benchmark, "chat", BOXED, None)
    assert (found.text, found.answers) == ("p" + BOXED, answers)


SIZES = {"math500": 500, "minerva_math": 272, "olympiadbench": 675, "amc23": 40, "aime24": 30, "aime25": 30}
SIZES |= {"gsm8k": 1319}
GROUPS = {"math500": {"level": 5, "subject": 7}, "minerva_math": {"type": 9}, "olympiadbench": {"subfield": 4}}


def test_the_released_files_are_read_whole(data_folder: Path) -> None:
    for benchmark in choose_benchmarks([*SIZES], data_folder):
        _, problems, groups = read_benchmark(benchmark, "plain", "", None)
        assert len(problems) == SIZES[benchmark.name]
        assert {field: len(set(values)) for field, values in groups.items()} == GROUPS.get(benchmark.name, {})
        assert all(len(answer) < 300 for problem in problems for answer in problem.answers)
        assert len(read_benchmark(benchmark, "plain", "", 3)[1]) == 3


def test_the_papers_six_are_the_default_and_have_its_samples() -> None:
    assert [b.name for b in choose_benchmarks([], None)] == PAPER == [*SIZES][:6]
    sampled = {name for name, benchmark in BENCHMARKS.items() if benchmark.samples == 32}
    assert sampled == {"amc23", "aime24", "aime25"}
    assert all(b.samples == 1 for name, b in BENCHMARKS.items() if name not in sampled)
    assert all(b.hub and b.path is None for b in choose_benchmarks([], None))


FILES = ("a/data/test-00000-of-00001.parquet", "b/train.jsonl", "b/README.md", "own.jsonl", "c/x.jsonl")
FILES += ("d/test.json", "d/test.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("math500={}/a", "{}/a/data/test-00000-of-00001.parquet"),
        ("aime24={}/b", "{}/b/train.jsonl"),
        ("own-set={}/own.jsonl", "{}/own.jsonl"),
        ("gsm8k=somebody/gsm8k", "somebody/gsm8k"),
    ],
)
def test_a_place_is_a_file_its_folder_or_a_hub_name(folder: Path, given: str, path: str) -> None:
    assert choose_benchmarks([given.format(folder)], None)[0].path == path.format(folder)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["maths500"], "maths500: unknown; did you mean math500"),
        (["amie24=x.jsonl"], "amie24: unknown; did you mean aime24"),
        (["mmlu"], "mmlu: unknown; must be one of math500,.* or NAME=FILE"),
        (["../x=own.jsonl"], "a name must be of letters"),
        (["gsm8k={}/own.jsonl", "gsm8k={}/own.jsonl"], "gsm8k: is named twice"),
        (["math500"], "math500: {}/math500: no such file or folder; name its place, math500=PLACE"),
        (["gsm8k={}/c"], "a folder without a file test.jsonl"),
        (["gsm8k={}/d"], "holds test.json and test.jsonl; name one of them"),
        (["gsm8k="], "is empty; must be a path"),
    ],
)
def test_what_cannot_be_meant_is_told(folder: Path, given: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told.format(folder)):
        choose_benchmarks([text.format(folder) for text in given], folder)


def test_a_row_without_what_a_benchmark_needs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"problem": "p", "key": 2}\n')
    [benchmark] = choose_benchmarks([f"gsm8k={file}"], None)
    with pytest.raises(UserError, match=r"x.jsonl, line 1: has no 'answer', .*; it has 'problem', 'key'"):
        read_benchmark(benchmark, "plain", "", None)
