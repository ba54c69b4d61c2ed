"""Rows become prompts, and every mistake in them is named with its file, line and field."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.run import ModelSettings, TeacherSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts import dataset
from megatron_sead.prompts.answers import reference_answers
from megatron_sead.prompts.dataset import Prompt, stream_prompts
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer

ROWS = [
    {"id": "a", "prompt": "1+1=", "answer": 2, "difficulty": 0.25, "level": 1, "solution": "1+1=2;"},
    {"id": "b", "prompt": "2+\u2028 1=", "answer": "3", "solution": "x"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_olmo3: Path) -> ModelTokenizer:
    return load_tokenizer(ModelSettings(path=tiny_olmo3), "student")


def write(path: Path, *lines: Any) -> PromptSettings:
    text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return PromptSettings(path=str(path), template="plain")


def load(path: Path, tokenizer: ModelTokenizer, *lines: Any, **changes: Any) -> list[Prompt]:
    return list(stream_prompts(write(path, *lines).model_copy(update=changes), tokenizer))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_formats_give_the_same_prompts(tmp_path: Path, tokenizer: ModelTokenizer, kind: str) -> None:
    path = tmp_path / f"prompts.{kind}"
    rows = [ROWS[0], ROWS[0] | ROWS[1] | {"difficulty": None, "level": None, "answer": 3}]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write(path, *rows)
    prompts = list(stream_prompts(PromptSettings(path=str(path), template="plain"), tokenizer))
    first = tokenizer.encode("1+1=")
    assert prompts[0] == Prompt("a", "1+1=", ("2",), 0.25, "1", first, first)
    assert [(p.id, p.difficulty, p.level, p.answers) for p in prompts[1:]] == [("b", None, None, ("3",))]


def test_fields_are_mapped_and_missing_ids_numbered(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    lines = [{"q": "1+1=", "r": 2, "d": "0.5", "topic": "sums"}, "", {"q": "1+2=", "r": 3}]
    changes = {"prompt_field": "q", "answer_field": "r", "difficulty_field": "d", "level_field": "topic"}
    prompts = load(tmp_path / "p.jsonl", tokenizer, *lines, instruction=" go", **changes)
    assert [(p.id, p.text, p.answers, p.difficulty, p.level) for p in prompts] == [
        ("0", "1+1= go", ("2",), 0.5, "sums"),
        ("1", "1+2= go", ("3",), None, None),
    ]


def test_chat_template_and_the_teachers_own_prompt(tmp_path: Path, tiny_olmo3: Path) -> None:
    student = load_tokenizer(ModelSettings(path=tiny_olmo3), "student")
    teacher = load_tokenizer(TeacherSettings(path=tiny_olmo3, system_prompt="be good"), "teacher")
    settings = write(tmp_path / "p.jsonl", *ROWS).model_copy(update={"template": "chat", "instruction": "!"})
    prompt, _ = stream_prompts(settings, student, teacher, teacher_prompt_field="solution")
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.student_token_ids == student.encode(turn.format("1+1=!"))
    system = "<|im_start|>system\nbe good<|im_end|>\n"
    assert prompt.teacher_token_ids == teacher.encode(system + turn.format("1+1=2;!"))
    assert prompt.student_token_ids[0] == 2  # <|im_start|> is one token, not its characters


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (27.0, ("27",)),
        (0.5, ("0.5",)),
        (7, ("7",)),
        ("72/2 = 36\n#### 1,072", ("1,072",)),
        (["$2$", "$-2$"], ("$2$", "$-2$")),
        (r"so \boxed{1} and \boxed{\frac{1}{2}}.", (r"\frac{1}{2}",)),
        (r"\boxed{unclosed", (r"\boxed{unclosed",)),
        ("  ", ()),
        (None, ()),
        (True, ("true",)),
        ([], ()),
        ('["34"]', ("34",)),
        (r'["\\frac{1}{2}", "2"]', (r"\frac{1}{2}", "2")),
        (r'["\frac{1}{2}"]', (r'["\frac{1}{2}"]',)),
        ("[3, 4]", ("[3, 4]",)),
        ("[0, 1)", ("[0, 1)",)),
        (1e-5, ("0.00001",)),
        (np.float32(0.1), ("0.1",)),
        (np.int64(2**53 + 1), ("9007199254740993",)),
        (Decimal("1.50"), ("1.5",)),
        (1e300, ("1" + "0" * 300,)),
    ],
)
def test_reference_answers(value: Any, expected: tuple[str, ...]) -> None:
    assert reference_answers(value) == expected


@pytest.mark.parametrize("value", [float("nan"), np.float64("inf"), "NaN", ["1", ""], [["1"]], {"a": 1}, b"1"], ids=str)
def test_what_is_no_answer_is_said(value: Any) -> None:
    with pytest.raises(ValueError, match=r"nan|inf|NaN|a list with|a value of type"):
        reference_answers(value)


GOOD = ROWS[0]


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        ('{"prompt": ', {}, r"p\.jsonl, line 2: not valid JSON: .*"),
        ("[1]", {}, r"p\.jsonl, line 2: must be a JSON object, not list"),
        ({"prompt": "1"}, {}, r"line 2: has no 'answer', which prompts.answer_field names; it has 'prompt'"),
        ({"answer": "1"}, {}, r"line 2: has no 'prompt', which prompts.prompt_field names; it has 'answer'"),
        (GOOD, {}, r"line 2: id 'a' is given twice, first at .*p\.jsonl, line 1"),
        (GOOD | {"id": "c", "difficulty": 1.5}, {}, r"line 2: difficulty=1\.5: must be 1 - pass rate, in \[0, 1\]"),
        (GOOD | {"id": "c", "difficulty": "hard"}, {}, r"line 2: difficulty='hard'"),
        (GOOD | {"id": "c", "answer": " "}, {}, r"line 2: 'answer' holds no answer"),
        (GOOD | {"id": "c", "prompt": ""}, {}, r"line 2: the prompt is empty"),
        (
            GOOD | {"id": "c", "prompt": 5},
            {},
            r"line 2: 'prompt' \(prompts.prompt_field\) must be text or a list of messages, not int",
        ),
        (
            GOOD | {"id": "c", "prompt": "1+" * 5},
            {"max_prompt_tokens": 9},
            r"line 2: prompt 'c' has 10 tokens, more than prompts.max_prompt_tokens=9",
        ),
        (GOOD | {"id": "c", "prompt": "1+" * 65}, {}, r"prompt 'c' has 130 tokens, more than fit in .* context of 128"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, tokenizer: ModelTokenizer, line: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "p.jsonl", tokenizer, GOOD, line, **changes)
    assert "\n" not in str(caught.value)


def told(path: Path, tokenizer: ModelTokenizer, *lines: Any, **changes: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(path, tokenizer, *lines, **changes)
    return str(caught.value).splitlines()


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    file = tmp_path / "p.jsonl"
    good = {"prompt": "1+1=", "answer": 2}
    lines = [good, '{"prompt": ', [1], good | {"answer": None}, good | {"difficulty": 7}, good | {"answer": ""}, good]
    first, second, third, fourth = told(file, tokenizer, *lines)
    assert first.startswith(f"{file}, line 2: not valid JSON: ")
    assert second == f"{file}, line 3: must be a JSON object, not list"
    assert third == f"{file}, line 4: 'answer' holds no answer (also line 6)"
    assert fourth.startswith(f"{file}, line 5: difficulty=7: must be 1 - pass rate")


def test_many_mistakes_are_counted(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    file = tmp_path / "p.jsonl"
    (line,) = told(file, tokenizer, *[{"question": "1+1=", "answer": 2}] * 500)
    assert line == (
        f"{file}, line 1: has no 'prompt', which prompts.prompt_field names; it has 'question', 'answer' "
        "(also line 2, line 3, line 4 and 496 more)"
    )
    lines = told(file, tokenizer, *[{"prompt": "1+1=", "answer": 2, "difficulty": 2 + index} for index in range(15)])
    assert [line.partition(": ")[0] for line in lines] == [f"{file}, line {number}" for number in range(1, 12)]
    assert lines[-1] == f"{file}, line 11: and 5 more rows with other mistakes"
    assert told(
        file, tokenizer, {"prompt": "1+1= " * 9, "answer": 2}, {"prompt": "1+", "answer": 2}, max_prompt_tokens=1
    ) == [
        f"{file}, line 1: prompt '0' has 45 tokens, more than prompts.max_prompt_tokens=1",
        f"{file}, line 2: prompt '1' has 2 tokens, more than prompts.max_prompt_tokens=1",
    ]


def test_a_response_must_find_room(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    settings = write(tmp_path / "p.jsonl", GOOD)
    assert list(stream_prompts(settings, tokenizer, max_new_tokens=124))
    told = r"4 tokens, which leaves no room for 125 new ones \(rollouts.max_new_tokens\) in the student's context"
    with pytest.raises(UserError, match=told):
        list(stream_prompts(settings, tokenizer, max_new_tokens=125))


def test_files_that_are_not_there_or_hold_nothing(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    cases = {"p.jsonl": "no such file", "empty.jsonl": "holds no prompts", "bad.parquet": "not a parquet file"}
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.parquet").write_text("x")
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            list(stream_prompts(PromptSettings(path=str(tmp_path / name), template="plain"), tokenizer))
    with pytest.raises(UserError, match=r"holds both bad.parquet and empty.jsonl"):
        list(stream_prompts(PromptSettings(path=str(tmp_path), template="plain"), tokenizer))


def test_a_hub_failure_is_one_line(tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"prompts.path=some/set: .*\(ConnectionError: no route to host\)"):
        list(stream_prompts(PromptSettings(path="some/set"), tokenizer))


@pytest.mark.parametrize(
    ("file", "prompt_field", "answer_field", "count", "first"),
    [
        ("gsm8k/train.jsonl", "question", "answer", 7473, ("72",)),
        ("amc23/test.jsonl", "problem", "answer", 40, ("27",)),
        ("minerva_math/test.jsonl", "problem", "solution", 272, ("1.6",)),
        ("olympiadbench/test.jsonl", "question", "final_answer", 675, ("2",)),
    ],
)
def test_real_files_with_the_real_tokenizer(
    data_folder: Path,
    tmp_path: Path,
    file: str,
    prompt_field: str,
    answer_field: str,
    count: int,
    first: tuple[str, ...],
) -> None:
    dolma = data_folder / "tokenizer_dolma2" / "allenai_dolma2.json"
    (tmp_path / "config.json").write_text('{"model_type": "olmo3", "vocab_size": 100278}')
    model = ModelSettings(path=tmp_path, tokenizer=dolma, stop_token_ids=[100257])
    settings = PromptSettings(
        path=str(data_folder / file), prompt_field=prompt_field, answer_field=answer_field, template="plain"
    )
    tokenizer = load_tokenizer(model, "student")
    prompts = list(stream_prompts(settings, tokenizer, limit=300))
    assert len(prompts) == min(count, 300)
    assert prompts[0].answers == first
    assert tokenizer.decode(prompts[0].student_token_ids) == prompts[0].text


def test_prompts_are_the_same_in_whatever_pieces_they_are_tokenized(
    tmp_path: Path, tiny_olmo3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"answer": 2, "prompt": f"{i}+1=" * (1 + i % 3), "solution": f"{i}+1=2;"} for i in range(7)]
    settings = write(tmp_path / "p.jsonl", *rows).model_copy(update={"template": "chat"})
    student = load_tokenizer(ModelSettings(path=tiny_olmo3), "student")
    teacher = load_tokenizer(TeacherSettings(path=tiny_olmo3, system_prompt="be good"), "teacher")
    for field in (None, "solution"):
        for model in (teacher, student):  # of the student's tokenizer, a text that both see is encoded once
            expected = [
                (student.encode(student.render(row["prompt"])), model.encode(model.render(row[field or "prompt"])))
                for row in rows
            ]
            for at_once in (1, 2, 512):
                monkeypatch.setattr(dataset, "AT_ONCE", at_once)
                prompts = stream_prompts(settings, student, model, teacher_prompt_field=field)
                assert [(p.student_token_ids, p.teacher_token_ids) for p in prompts] == expected


def test_mistakes_among_prompts_that_are_tokenized_together_are_told_by_row(
    tmp_path: Path, tokenizer: ModelTokenizer
) -> None:
    file = tmp_path / "p.jsonl"
    good = {"prompt": "1+1=", "answer": 2}
    lines = [good, good | {"prompt": "1+1= " * 9}, "{", good | {"prompt": "2+2= " * 9}, good]
    settings = write(file, *lines).model_copy(update={"max_prompt_tokens": 20})
    prompts = stream_prompts(settings, tokenizer)
    assert [next(prompts).id, next(prompts).id] == ["0", "3"]  # the row that is no JSON has no number
    with pytest.raises(UserError) as refusal:
        next(prompts)
    assert [line.partition(": ")[0] for line in str(refusal.value).splitlines()] == [
        f"{file}, line 2",
        f"{file}, line 3",
        f"{file}, line 4",
    ]
