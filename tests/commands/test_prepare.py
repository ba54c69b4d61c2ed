"""A released set becomes a training file: what is left out is counted and told, and nothing that exists is replaced."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from megatron_sead.commands.prepare import main
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.preparation.overlap import Benchmarks, words
from megatron_sead.prompts.problems import read_problems

TOOL = Path(__file__).parents[2] / "tools" / "prepare_prompts.py"
BEGINS, ENDS = "Solve the problem step by step.\n\n", '\n\nPut your answer on its own line after "Answer:".'
WALK = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of $s$ kilometers per hour, the walk takes her 4 hours, including $t$ minutes spent in the shop."
)
DAPO_FIELDS = ["answer_field=reward_model.ground_truth", "id_field=extra_info.index"]


def dapo(problem: str, answer: str, index: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": BEGINS + problem + ENDS, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def prepare(source: Path | str, output: Path, *overrides: str, **options: Any) -> int:
    """In this process; the exit code."""
    try:
        main(source=str(source), output=output, overrides=list(overrides), **options)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def counts(output: Path) -> dict[str, int]:
    record = json.loads(output.with_name(f"{output.name}.provenance.json").read_text())
    return {reason: count["rows"] for reason, count in record["counts"].items() if count["rows"]}


def dropped(output: Path) -> list[dict[str, Any]]:
    return read(output.with_name(f"{output.name}.dropped.jsonl"))


@pytest.mark.parametrize("name", ["dapo.parquet", "dapo.jsonl"])
def test_dapo_in_its_released_form(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All but one of its copies are left out, and what is written is read with default names."""
    problems = [dapo(f"What is {i} + {i}?", str(2 * i), f"index-{i}") for i in range(5)]
    source, output = write(tmp_path / name, *problems * 4), tmp_path / "out.jsonl"
    assert prepare(source, output, *DAPO_FIELDS) == 0
    assert counts(output) == {"kept": 5, "duplicate": 15}
    kept = read_problems(PromptSettings(path=str(output)))
    assert [(p.id, p.text, p.answers) for p in kept] == [
        (f"index-{i}", problems[i]["prompt"][0]["content"], (str(2 * i),)) for i in range(5)
    ]
    assert [row["rows"] for row in dropped(output)] == [[i + 6, i + 11, i + 16] for i in range(5)]
    assert {row["reason"] for row in dropped(output)} == {"duplicate"}
    assert read(output)[0]["source"]["data_source"] == "math_dapo"
    told = capsys.readouterr().out
    assert "duplicate" in told and "drop_instruction=true" in told

    bare = tmp_path / "bare.jsonl"
    assert prepare(source, bare, *DAPO_FIELDS, "drop_instruction=true") == 0
    assert [problem.text for problem in read_problems(PromptSettings(path=str(bare)))] == [
        f"What is {i} + {i}?" for i in range(5)
    ]


def test_every_reason_is_counted_and_told(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "What is 1 + 1?", "answer": 2, "id": "a"},
        {"prompt": " What  is 1 + 1?\n", "answer": "2.0"},  # the same, by a grader
        {"prompt": "What is 2 + 2?", "answer": "4"},
        {"prompt": "What is 2 + 2?", "answer": "5"},
        {"prompt": "What is 2 + 2?", "answer": "4"},
        {"prompt": "", "answer": "1"},
        {"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"},
        {"prompt": "Prove it.", "answer": "proof"},
        {"prompt": "Cut off.", "answer": r"\frac{1}{2"},
        {"prompt": "Nothing.", "answer": None},
        {"prompt": "Not there."},
        {"prompt": WALK, "answer": "204"},
        {"prompt": "Note. " + WALK.replace("morning", "evening") + " Find it.", "answer": "204"},
        {"prompt": "An ordinary problem about nothing else?", "answer": "7", "id": "a"},
    ]
    source, output = write(tmp_path / "p.jsonl", *rows), tmp_path / "out.jsonl"
    benchmark = write(tmp_path / "test.jsonl", {"question": WALK.upper().replace("$", "")}, {"problem": "1 + 1?"})
    assert prepare(source, output, benchmarks=[str(benchmark)]) == 0
    assert counts(output) == {
        "kept": 2,
        "duplicate": 1,
        "no prompt": 2,
        "no answer": 4,
        "conflicting answers": 3,
        "in a benchmark": 1,
        "near a benchmark": 1,
    }
    found = {row["reason"]: row for row in dropped(output)}
    assert found["conflicting answers"]["rows"] == [3, 4, 5]
    assert list(found["conflicting answers"]["answers"]) == ["4", "5"]
    near = found["near a benchmark"]
    assert (near["place"], near["benchmark"]) == (f"{source}, line 13", f"{benchmark}, line 1")
    assert near["text"] == rows[12]["prompt"] and near["benchmark_text"].startswith("EVERY MORNING")
    assert 0.5 <= near["share"] < 1
    assert "stands for no answer" in next(row["told"] for row in dropped(output) if row["text"] == "Prove it.")
    ids = [row["id"] for row in read(output)]
    assert ids[0] == "a" and len(ids[1]) == 16  # the id was another problem's


def test_ids_made_of_texts_do_not_depend_on_the_rest_of_the_set(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": i} for i in range(4)]
    for name, some in (("one", rows), ("other", rows[::-1][:3])):
        assert prepare(write(tmp_path / f"{name}.jsonl", *some), tmp_path / f"{name}.out.jsonl") == 0
    one, other = ({row["prompt"]: row["id"] for row in read(tmp_path / f"{n}.out.jsonl")} for n in ("one", "other"))
    assert len(set(one.values())) == 4 and other.items() <= one.items()


def test_long_prompts_are_dropped_by_a_models_tokens(tiny_olmo3: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1+" * n + "1", "answer": n + 1} for n in (1, 10, 200)]
    source = write(tmp_path / "p.jsonl", *rows)
    limited = ["prompts.max_prompt_tokens=20", "template=plain"]
    assert prepare(source, tmp_path / "out.jsonl", *limited, model=str(tiny_olmo3)) == 0
    assert counts(tmp_path / "out.jsonl") == {"kept": 1, "too long": 2}
    told = [row["told"] for row in dropped(tmp_path / "out.jsonl")]
    assert told[0] == "21 tokens, more than prompts.max_prompt_tokens=20"
    assert "the model's context=128" in told[1]


def test_mistakes_are_one_line_and_leave_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.jsonl", {"prompt": "1?", "answer": 1})
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "1?", "answer": 1}\n{"prompt": "2?", "ans')
    occupied = [tmp_path / f"{n}.jsonl" for n in ("there", "beside")]
    occupied[0].write_text("mine")
    (tmp_path / "beside.jsonl.dropped.jsonl").write_text("mine")
    output, before = tmp_path / "out.jsonl", sorted(tmp_path.iterdir())
    cases: list[tuple[Path, Path, list[str], dict[str, Any], str]] = [
        (tmp_path / "no.jsonl", output, [], {}, "no such file"),
        (good, output, ["answer_field=reward.x"], {}, "no prompt is left of 1 row (1 no answer); the first: "),
        (good, output, ["answer_fild=x"], {}, "did you mean prompts.answer_field?"),
        (good, output, ["max_prompt_tokens=5"], {}, "name its directory with model.path"),
        (torn, output, [], {}, "line 2: not valid JSON"),
        (good, output, [], {"benchmarks": [str(tmp_path / "b.jsonl")]}, "benchmarks="),
        (good, output, ["benchmark_field=q"], {"benchmarks": [str(good)]}, "has no 'q', which benchmark_field names"),
        (good, occupied[0], [], {}, "exists already"),
        (good, occupied[1], [], {}, "beside.jsonl.dropped.jsonl: exists already"),
        (good, tmp_path / "out.parquet", [], {}, "JSON lines are written"),
    ]
    for source, written, overrides, options, message in cases:
        assert prepare(source, written, *overrides, **options) == 2
        errors = capsys.readouterr().err
        assert message in errors and len(errors.strip().splitlines()) == 1, errors
    assert sorted(tmp_path.iterdir()) == before


def test_a_difficulty_that_is_none_is_refused_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "p.jsonl", {"prompt": "1?", "answer": 1, "difficulty": "4.5"})
    assert prepare(source, tmp_path / "out.jsonl") == 2
    assert "set prompts.difficulty_field to another name" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out.jsonl", "difficulty_field=pass") == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert "difficulty" not in row and row["source"]["difficulty"] == "4.5"


def test_a_hub_data_set_and_fields_that_json_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1?", "solution": "1", "image": b"\xff"}, {"prompt": "1?", "solution": "1", "image": b""}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list(rows))
    assert prepare("open-r1/DAPO-Math-17k-Processed", tmp_path / "out.jsonl", "answer_field=solution", "subset=en") == 0
    assert counts(tmp_path / "out.jsonl") == {"kept": 1, "duplicate": 1}
    assert "left out, as JSON cannot hold it: image" in capsys.readouterr().out
    assert read(tmp_path / "out.jsonl")[0]["source"]["place"] == "open-r1/DAPO-Math-17k-Processed, train row 1"


def test_ctrl_c_leaves_nothing_and_the_same_command_starts_anew(tmp_path: Path) -> None:
    source, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        file.writelines(f'{{"prompt": "What is {i}?", "answer": {i}}}\n' for i in range(60_000))
    arguments = [sys.executable, str(TOOL), "--input", str(source), "--output", str(output)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out.jsonl.*.writing")):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing was written" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [source]
    write(source, {"prompt": "1?", "answer": 1})
    assert prepare(source, output) == 0


def test_normalisation_keeps_what_the_problem_says() -> None:
    same = [r"Let $x \le \dfrac{1}{2}$,  find\, X·2.", r"let x \leq \frac 1 2 find $$x \times 2$$"]
    assert words(same[0]) == words(same[1])
    for one, other in (("x + 1", "x - 1"), ("2x", "3x"), ("x < 1", "x > 1"), (r"\sin x", r"\cos x")):
        assert words(one) != words(other)


def test_what_only_sounds_alike_is_no_overlap() -> None:
    known = Benchmarks(8, 0.5)
    known.add("b", "Find the remainder when $2^{100}$ is divided by $1000$. Express your answer as an integer.")
    known.add("c", "What is 2 + 2?")
    assert known.find("Find the remainder when the sum of all odd squares is divided by $1000$.") is None
    assert known.find("Explain: what is 2 + 2? And then, what is the sum of the first ten primes?") is None
    embedded = known.find(
        "Hi! Find the remainder when $2^{100}$ is divided by $1000$. Express your answer as an integer. Bye!"
    )
    assert embedded is not None and not embedded.is_exact and embedded.share == 1


def test_a_folder_of_shards_is_prepared_and_its_rows_are_told_with_their_files(tmp_path: Path) -> None:
    problems = [dapo(f"What is {i} + {i}?", str(2 * i), f"index-{i}") for i in range(4)]
    folder, output = tmp_path / "release", tmp_path / "out.jsonl"
    folder.mkdir()
    write(folder / "train-0.parquet", *problems[:3], problems[1])
    write(folder / "train-1.parquet", problems[3], problems[1])
    assert prepare(folder, folder / "out.jsonl", *DAPO_FIELDS) == 2  # nothing is written among what is read
    assert prepare(folder, output, *DAPO_FIELDS) == 0
    assert counts(output) == {"kept": 4, "duplicate": 2}
    (copies,) = dropped(output)
    assert copies["rows"] == [f"{folder / 'train-0.parquet'}, row 4", f"{folder / 'train-1.parquet'}, row 2"]
    Dataset.from_list(problems).save_to_disk(str(tmp_path / "saved"))
    assert prepare(tmp_path / "saved", tmp_path / "of_saved.jsonl", *DAPO_FIELDS) == 0
    texts = [
        [p.text for p in read_problems(PromptSettings(path=str(path)))]
        for path in (output, tmp_path / "of_saved.jsonl")
    ]
    assert texts[0] == texts[1]


def test_one_problem_in_two_encodings_is_one_problem_and_a_power_is_no_factor(tmp_path: Path) -> None:
    """é is one code point or two; 2² and 22, which compatibility normalisation would make equal, are not the same."""
    texts = ["Caf\u00e9s: 1+1?", "Cafe\u0301s:\u00a01+1?", "What is 2\u00b2?", "What is 22?"]
    source = write(tmp_path / "in.jsonl", *({"prompt": text, "answer": "2"} for text in texts))
    assert prepare(source, tmp_path / "out.jsonl") == 0
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == [texts[0], *texts[2:]]
