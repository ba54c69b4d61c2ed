"""A run, its held-out evaluation, a check before it and an estimate of difficulty are each fed the same odd files."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sead.commands.difficulty import main as estimate_difficulty
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.run import ModelSettings, RunConfig, load_config
from megatron_sead.errors import UserError
from megatron_sead.planning.preflight import check_inputs
from megatron_sead.prompts.dataset import stream_prompts
from megatron_sead.prompts.exact_json import dumps, loads
from megatron_sead.prompts.problems import read_problems, repeats
from megatron_sead.prompts.rows import is_hub_name
from megatron_sead.prompts.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "1+1=", "answer": "2"}
LINE = json.dumps(GOOD).encode()


def parquet(**columns: Any) -> bytes:
    return table_bytes(pa.table({"prompt": [f"{i}+1=" for i in range(len(columns["answer"]))]} | columns))


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def row(**changes: str) -> bytes:
    """Values are JSON as written."""
    fields = {"prompt": '"1+1="', "answer": '"2"'} | changes
    return b"{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()).encode() + b"}"


SHARD = parquet(answer=["2"] * 100)

REFUSED: dict[str, tuple[str, bytes, str]] = {
    # Something else than its name says
    "gzip": ("p.jsonl.gz", gzip.compress(LINE), "compressed with gzip.*unpack it first"),
    "gzip under another name": ("p.jsonl", gzip.compress(LINE), "compressed with gzip"),
    "zip": ("p.zip", b"PK\x03\x04..", "a zip archive or a spreadsheet"),
    "csv": ("p.csv", b"prompt,answer\n1+1=,2\n", "a table of CSV"),
    "pointer": ("p.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    "pointer as parquet": ("p.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "web page": ("p.jsonl", b"\n<!DOCTYPE html><html>", "HTML or XML"),
    "lines as parquet": ("p.PARQUET", LINE, "not a parquet file"),
    "arrow": ("p.arrow", b"ARROW1\0\0", "an Arrow file"),
    # Empty or damaged
    "no bytes": ("p.jsonl", b"", r"holds no prompts: the file is empty \(0 bytes\)"),
    "no bytes of parquet": ("p.parquet", b"", "the file is empty"),
    "no rows of parquet": ("p.parquet", parquet(answer=pa.array([], pa.string())), "holds no prompts"),
    "no items": ("p.json", b"[]", "holds no prompts"),
    "blank lines": ("p.jsonl", b"\n \n", "holds no prompts"),
    "parquet cut short": ("p.parquet", SHARD[:200], "not a whole parquet file"),
    "line cut short": ("p.jsonl", LINE + b"\n" + LINE[:-5], "line 2: not valid JSON: .* at column"),
    "array cut short": ("p.json", b"[" + LINE + b",\n" + LINE, "not valid JSON: .* at line 2, column"),
    "NUL bytes": ("p.jsonl", LINE + b"\n\0\0\0\n", "line 2: not valid JSON: a NUL byte"),
    "files joined": ("p.jsonl", LINE + b"\n\xef\xbb\xbf" + LINE, "line 2: not valid JSON: a byte-order mark"),
    "UTF-16": (
        "p.jsonl",
        LINE.decode().encode("utf-16"),
        r"not UTF-8 text at byte 0 \(line 1\); it begins like UTF-16",
    ),
    "Latin-1": ("p.jsonl", LINE + b'\n{"prompt": "\xe9"}', r"not UTF-8 text at byte \d+ \(line 2\)"),
    "text of parquet": (
        "p.parquet",
        parquet(answer=pa.Array.from_buffers(pa.string(), 2, pa.array([b"2", b"\xff"]).buffers())),
        "row 2: 'answer' cannot be read: 'utf-8' codec",
    ),
    # Another structure
    "object over lines": ("p.json", json.dumps(GOOD, indent=1).encode(), "one JSON object over several lines"),
    "rows in an object": ("p.json", json.dumps({"data": [GOOD]}).encode(), "has no 'prompt'.*; it has 'data'"),
    "a number among rows": ("p.json", json.dumps([GOOD, GOOD, 5]).encode(), "item 3: must be a JSON object, not int"),
    "two on a line": ("p.jsonl", LINE + b" " + LINE, "line 1: not valid JSON: Extra data at column"),
    "a name twice": ("p.jsonl", row() + b"\n" + row(answer='1, "answer": 2'), "line 2: .*has 'answer' twice"),
    "a name twice inside": ("p.json", b"[" + row(x='{"y": 1, "y": 2}') + b"]", "item 1: field 'x' has 'y' twice"),
    "columns twice": (
        "p.parquet",
        table_bytes(pa.Table.from_arrays([pa.array(["1"])] * 3, names=["prompt", "answer", "answer"])),
        "has two columns 'answer'",
    ),
    "deep": ("p.jsonl", row(x="[" * 100_000 + "]" * 100_000), "more than 100 lists or objects"),
    "not so deep": ("p.jsonl", row(x="[" * 101 + "]" * 101), "line 1: field 'x' has more than 100 lists"),
    "exponent": ("p.jsonl", row(x="1e99999999999999999999"), "out of all range"),
    # Lone surrogates, wherever they stand
    **{
        f"surrogate in {name}": ("p.jsonl", LINE + b"\n" + row(**{name: value}), f"line 2: field '{name}' holds .ud83d")
        for name, value in {
            "prompt": r'"1\ud83d"',
            "answer": r'"\ud83d"',
            "id": r'"\ud83d"',
            "level": r'"\ud83d"',
            "unused": r'{"a": ["b", "\ud83d"]}',
        }.items()
    },
    "surrogate in a name": ("p.jsonl", row()[:-1] + rb', "\udc00": 1}', r"line 1: field '.udc00' holds .udc00"),
    # Prompts
    "prompt of nothing": ("p.jsonl", row(prompt='""'), r"the prompt is empty, 'prompt' \(prompts.prompt_field\)"),
    "prompt of spaces": ("p.jsonl", row(prompt=r'" \n\u3000"'), "the prompt is empty"),
    "prompt of no width": ("p.jsonl", row(prompt=r'"\u200b\ufeff"'), "the prompt is empty"),
    "prompt null": ("p.jsonl", row(prompt="null"), "the prompt is empty"),
    "prompt nan": ("p.jsonl", row(prompt='"nan"'), "the prompt is empty, .*: it is 'nan'"),
    "prompt a number": ("p.jsonl", row(prompt="5"), "must be text or a list of messages, not int"),
    "messages with the answer": (
        "p.jsonl",
        row(prompt='[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]'),
        "ends with a message of the assistant",
    ),
    "messages without words": (
        "p.jsonl",
        row(prompt='[{"role": "user", "content": ""}]'),
        "the prompt is empty.*message 1",
    ),
    "no messages": ("p.jsonl", row(prompt="[]"), "the prompt is empty, .* no message is in it"),
    "messages by other names": (
        "p.jsonl",
        row(prompt='[{"from": "human", "value": "1"}]'),
        "message 1 is an object with 'from', 'value'",
    ),
    "messages cut short": ("p.jsonl", row(prompt=r'"[{\"role\": \"user\"}"'), "is not valid JSON"),
    "messages as Python prints them": ("p.jsonl", row(prompt="\"[{'role': 'user', 'content': '1'}]\""), "not JSON"),
    # Answers
    **{
        f"answer {value}": ("p.jsonl", LINE + b"\n" + row(answer=value), "line 2: 'answer' holds no answer" + more)
        for value, more in {
            "NaN": " but nan, which is no finite number",
            "Infinity": " but inf",
            "-Infinity": " but -inf",
            "null": "",
            '""': "",
            "[]": "",
            r'"\u200b"': "",
            r'"\\boxed{ }"': "",
            '"nan"': r" but the text 'nan', which programs write for a missing value; .*text\{nan\}",
            '"So #### None"': " but the text 'None'",
            '["1", null]': " but a list with an empty place",
            "[[1, 2]]": " but a list with a list in it",
            '{"value": 1}': " but a value of type dict",
            "1e5000": " but a number of more than 1,000 digits",
            "1" * 5000: " but a number of more than 1,000 digits",
        }.items()
    },
    "answer NaN of parquet": (
        "p.parquet",
        parquet(answer=[1.0, float("nan")]),
        "row 2: 'answer' holds no answer but nan",
    ),
    "answer null of parquet": ("p.parquet", parquet(answer=[1.0, None]), "row 2: 'answer' holds no answer"),
    "answer of bytes": ("p.parquet", parquet(answer=[b"2"]), "row 1: .* a value of type bytes"),
    # Other fields
    **{
        f"difficulty {value}": ("p.jsonl", row(difficulty=value), f"difficulty={shown}: must be 1 - pass rate")
        for value, shown in {"true": "True", "NaN": "nan", '"NaN"': "'NaN'", "1.50": "1.50", "[0]": r"\[0\]"}.items()
    },
    "level a list": ("p.jsonl", row(level='["a"]'), r"'level' is \['a'\]: .* set prompts.level_field to another name"),
    "id NaN": ("p.jsonl", row(id="NaN"), "'id' is nan: must be text or a number"),
    "ids of two types": ("p.jsonl", row(id="1") + b"\n" + row(id='"1"'), "line 2: id '1' is given twice"),
    "an id that is a row's number": (
        "p.jsonl",
        row(id="1") + b"\n" + row(),
        "given twice.*a row without one has its number",
    ),
}

READ: dict[str, tuple[str, bytes, list[tuple[str, ...]]]] = {
    "upper case": ("P.JSONL", LINE, [("2",)]),
    "parquet in upper case": ("P.PARQUET", parquet(answer=["2"]), [("2",)]),
    "parquet as lines": ("p.jsonl", parquet(answer=["2"]), [("2",)]),
    "array as lines": ("p.jsonl", b"\n[\n" + LINE + b"\n]\n", [("2",)]),
    "byte-order mark, Windows lines": ("p.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + LINE, [("2",), ("2",)]),
    "categories": ("p.parquet", parquet(answer=pa.array(["2", "3"]).dictionary_encode()), [("2",), ("3",)]),
    "single precision": ("p.parquet", parquet(answer=pa.array([0.1, 1e-5], pa.float32())), [("0.1",), ("0.00001",)]),
    "decimals": ("p.parquet", parquet(answer=pa.array([Decimal("27.00"), Decimal("0.10")])), [("27",), ("0.1",)]),
    "double precision": ("p.parquet", parquet(answer=[1e-5, 27.0]), [("0.00001",), ("27",)]),
    "lists": ("p.parquet", parquet(answer=pa.array([[0.1, 2]], pa.list_(pa.float32()))), [("0.1", "2")]),
    "long lists": ("p.parquet", parquet(answer=pa.array([[0.1]], pa.large_list(pa.float32()))), [("0.1",)]),
    "a message": ("p.jsonl", row(prompt='[{"role": "user", "content": "1", "name": null}]'), [("2",)]),
    "a message as text": ("p.jsonl", row(prompt=r'" [{\"content\": \"1\", \"role\": \"user\"}]"'), [("2",)]),
    "a list that is no conversation": ("p.jsonl", row(prompt=r'"[{\"x\": 1}] has how many items?"'), [("2",)]),
    "not used": ("p.jsonl", row(x="NaN", y="1" * 5000, z="[" * 90 + "]" * 90), [("2",)]),
    "a character of two escapes": ("p.jsonl", row(x=r'"\ud83d\ude00"'), [("2",)]),
    "an id of any text": ("p.jsonl", row(id=r'"../a\nb\u2028"', level="1.0"), [("2",)]),
    **{
        f"number {value}": ("p.jsonl", row(answer=value), [(text,)])
        for value, text in {
            "0.00001": "0.00001",
            "1e-7": "0.0000001",
            "-2.50": "-2.5",
            "12345678901234567890.0": "12345678901234567890",
            "9007199254740993": "9007199254740993",
            "0.1000000000000000055511151231257827": "0.1000000000000000055511151231257827",
            "1E3": "1000",
            "-0.0": "0",
            "1e400": "1" + "0" * 400,
            "true": "true",
            "false": "false",
        }.items()
    },
}


def run_config(model: Path, *overrides: str) -> RunConfig:
    paths = [f"student.path={model}", f"teacher.path={model}", "output=unused", "curriculum.mode=none"]
    paths += ["training.global_batch_size=1", "rollouts.engine=transformers", "teacher.prompt_field=prompt"]
    return load_config(ROOT / "examples/configs/sead_7b.yaml", [*paths, "prompts.template=plain", *overrides])


@pytest.mark.parametrize("case", REFUSED)
def test_all_refuse_an_odd_file_with_the_same_line(
    case: str, tiny_olmo3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(
            stream_prompts(
                PromptSettings(path=str(path), template="plain"),
                load_tokenizer(ModelSettings(path=tiny_olmo3), "student"),
            )
        )
    told = str(caught.value)
    assert str(path) in told
    assert "\n" not in told
    with pytest.raises(UserError) as caught:
        check_inputs(run_config(tiny_olmo3, f"prompts.path={path}"))
    assert str(caught.value) == told
    (tmp_path / "good.jsonl").write_bytes(LINE)
    with pytest.raises(UserError) as caught:
        check_inputs(run_config(tiny_olmo3, f"prompts.path={tmp_path / 'good.jsonl'}", f"evaluation.path={path}"))
    own_settings = r"prompts\.(path|prompt_field|answer_field|level_field)"
    assert str(caught.value) == re.sub(own_settings, r"evaluation.\1", told)
    with pytest.raises(SystemExit) as stopped:
        estimate_difficulty(tmp_path / "out.jsonl", tiny_olmo3, str(path), None, [])
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"error: {told}\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted({name, "good.jsonl"})


@pytest.mark.parametrize("case", READ)
def test_all_read_what_is_only_unusual(case: str, tiny_olmo3: Path, tmp_path: Path) -> None:
    name, content, answers = READ[case]
    path = tmp_path / name
    path.write_bytes(content)
    assert [problem.answers for problem in read_problems(PromptSettings(path=str(path)))] == answers
    assert not [
        note for note in check_inputs(run_config(tiny_olmo3, f"prompts.path={path}")) if "rows have" not in note
    ]


def test_the_teachers_own_prompt_and_difficulty_are_checked_where_they_are_needed(
    tiny_olmo3: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(row(difficulty="0.5", hint='"x"') + b"\n" + row(hint='" "'))
    given = f"prompts.path={path}"
    assert len(check_inputs(run_config(tiny_olmo3, given))) == 1  # a repeated prompt
    with pytest.raises(UserError, match=r"line 2: the prompt is empty, 'hint' \(teacher.prompt_field\)"):
        check_inputs(run_config(tiny_olmo3, given, "teacher.prompt_field=hint"))
    with pytest.raises(UserError, match=r"prompts.instruction='.+d83d': is not UTF-8 text"):
        check_inputs(run_config(tiny_olmo3, given, 'prompts.instruction="\\ud83d"'))
    with pytest.raises(UserError, match=r"line 2: has no 'difficulty', which the curriculum needs"):
        check_inputs(run_config(tiny_olmo3, given, "curriculum.mode=gated"))
    evaluated = [given, f"evaluation.path={tmp_path / 'held.jsonl'}", "evaluation.limit=1"]
    (tmp_path / "held.jsonl").write_bytes(LINE + b"\n" + row(answer="null"))
    check_inputs(run_config(tiny_olmo3, *evaluated))
    with pytest.raises(UserError, match=r"held\.jsonl, line 2: 'answer' holds no answer"):
        check_inputs(run_config(tiny_olmo3, *evaluated, "evaluation.limit=2"))


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("org/name", True),
        ("org/set-v1.5", True),
        ("gsm8k", True),
        ("org/prompts.jsnl", False),
        ("prompts.jsonl", False),
        ("here/prompts", False),  # the folder is there, the file is not
        ("a/b/c", False),
        ("./prompts", False),
        ("~/prompts", False),
        ("/data/prompts", False),
        ("x" * 300 + ".jsonl", False),
        ("a\0b", False),
    ],
)
def test_a_misspelt_file_is_no_hub_name(
    path: str, hub: bool, tiny_olmo3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(path) == hub
    config = run_config(tiny_olmo3)
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"path": path})})
    if hub:
        assert check_inputs(config) == [
            f"prompts.path={path}: no such file here; the run will load the hub data set of this name"
        ]
    else:
        with pytest.raises(UserError, match=r"prompts\.path=.*(no such file; must be|cannot be read)"):
            check_inputs(config)


def test_repeated_prompts_are_counted(tmp_path: Path) -> None:
    def told(*lines: tuple[str, str]) -> list[str]:
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in lines))
        return repeats(read_problems(PromptSettings(path=str(path))), "SET")

    assert told(("a", "1"), ("b", "1")) == []
    same, other = told(("a  b", "1"), ("a b\n", "1"), ("a b", "1"), ("a b", "2"))
    assert same.startswith("SET: 2 of 4 rows have the prompt of an earlier row and the same answer")
    assert "line 2 and " in same
    assert other.startswith("SET: 1 of 4 rows have the prompt of an earlier row and another answer")
    assert "line 4 and " in other


def test_a_hub_data_set_is_read_like_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Value

    features = Features({"prompt": Value("string"), "answer": Value("float32")})
    sets = {("org/name", None): [0.1], ("org/name", "hard"): [0.2]}

    def load_dataset(path: str, subset: str | None, *, split: str) -> Dataset:
        assert split == "test"
        return Dataset.from_list([{"prompt": "1", "answer": a} for a in sets[path, subset]], features=features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (only,) = read_problems(PromptSettings(path="org/name", split="test"))
    assert (only.place, only.answers) == ("org/name, test row 1", ("0.1",))
    (only,) = read_problems(PromptSettings(path="org/name", subset="hard", split="test"))
    assert only.answers == ("0.2",)


def test_a_file_has_no_subsets(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    with pytest.raises(
        UserError, match=r"^prompts.subset=hard: only a hub data set has subsets, and prompts.path=.* is a file"
    ):
        read_problems(PromptSettings(path=str(tmp_path / "p.jsonl"), subset="hard"))


def test_json_is_written_as_it_was_read() -> None:
    text = '{"a": 1.10, "b": 12345678901234567890.0, "c": 1E+400, "d": [null, true, "é\\n"], "e": {"f": -0.0}}'
    assert dumps(loads(text)) == text
    assert dumps([float("nan"), loads("-Infinity"), 1e-5]) == "[null, null, 1e-05]"
    with pytest.raises(TypeError, match="bytes"):
        dumps({"a": [b"1"]})


def test_a_check_of_prompts_needs_no_torch() -> None:
    code = "import sys, megatron_sead.planning.preflight; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
