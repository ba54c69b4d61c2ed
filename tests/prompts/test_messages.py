"""Prompts in the forms in which they are released: lists of messages with their roles, fields within fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.dataset import Prompt, stream_prompts
from megatron_sead.prompts.messages import Turn, as_value, conversation, with_instruction
from megatron_sead.prompts.problems import read_problems
from megatron_sead.prompts.tokenizer import load_tokenizer

USER = {"role": "user", "content": "1+1="}
SYSTEM = {"role": "system", "content": "Be brief."}
SHOTS = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}, USER]
DAPO = {
    "data_source": "math_dapo",
    "prompt": [
        {"content": 'Solve 1+1.\n\nRemember to put your answer on its own line after "Answer:".', "role": "user"}
    ],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
FIELDS = {"answer_field": "reward_model.ground_truth", "id_field": "extra_info.index"}


def write(path: Path, *rows: dict[str, Any], **settings: Any) -> PromptSettings:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSettings(path=str(path), **settings)


@pytest.mark.parametrize("name", ["dapo.parquet", "dapo.jsonl"])
def test_dapo_is_read_as_it_is_released(tmp_path: Path, name: str) -> None:
    (problem,) = read_problems(write(tmp_path / name, DAPO, **FIELDS))
    assert problem.turns == (Turn("user", DAPO["prompt"][0]["content"]),)
    assert (problem.answers, problem.id) == (("34",), DAPO["extra_info"]["index"])
    as_text = DAPO | {"prompt": json.dumps(DAPO["prompt"]), "reward_model": json.dumps(DAPO["reward_model"])}
    (written,) = read_problems(write(tmp_path / name, as_text, **FIELDS))
    assert (written.turns, written.answers, written.id) == (problem.turns, problem.answers, problem.id)


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], SHOTS, [SYSTEM, *SHOTS]], ids=len)
def test_a_conversation_keeps_its_roles(tiny_olmo3: Path, tmp_path: Path, messages: list[dict[str, str]]) -> None:
    """Its tokens are those of the template on the same messages, the instruction behind the last one."""
    tokenizer = load_tokenizer(ModelSettings(path=tiny_olmo3), "student")
    settings = write(tmp_path / "p.jsonl", {"prompt": messages, "answer": "2"}, instruction=" Go.")
    (prompt,) = stream_prompts(settings, tokenizer)
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    turns = turns.removesuffix("<|im_end|>\n") + " Go.<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.student_token_ids == tokenizer.encode(turns)


def test_the_settings_system_prompt_joins_a_conversation_without_one_and_contradicts_none(
    tiny_olmo3: Path, tmp_path: Path
) -> None:
    def asked(messages: list[dict[str, str]], system: str | None) -> Prompt:
        tokenizer = load_tokenizer(ModelSettings(path=tiny_olmo3, system_prompt=system), "student")
        (prompt,) = stream_prompts(write(tmp_path / "p.jsonl", {"prompt": messages, "answer": "2"}), tokenizer)
        return prompt

    same = asked([SYSTEM, USER], None).student_token_ids
    assert asked([USER], "Be brief.").student_token_ids == asked([SYSTEM, USER], "Be brief.").student_token_ids == same
    with pytest.raises(
        UserError, match=r"line 1: student\.system_prompt='Be long\.': the prompt has a system message of its own"
    ):
        asked([SYSTEM, USER], "Be long.")


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    settings = write(tmp_path / "p.parquet", {"prompt": [SYSTEM, USER], "answer": "2"}, template="plain")
    with pytest.raises(UserError, match=r"row 1: 'prompt' .* a conversation of 2 messages, .* 'chat', not 'plain'"):
        read_problems(settings)
    (problem,) = read_problems(write(tmp_path / "p.parquet", {"prompt": [USER], "answer": "2"}, template="plain"))
    assert problem.text == "1+1="


def test_a_template_that_drops_a_message_is_refused(tiny_olmo3: Path, tmp_path: Path) -> None:
    (tmp_path / "last.jinja").write_text("{{ messages[-1]['content'] }}:")
    model = ModelSettings(path=tiny_olmo3, chat_template=tmp_path / "last.jinja")
    settings = write(tmp_path / "p.jsonl", {"prompt": [SYSTEM, USER], "answer": "2"})
    with pytest.raises(UserError, match=r"last\.jinja: the chat template leaves out the system's message 'Be brief\.'"):
        list(stream_prompts(settings, load_tokenizer(model, "student")))


def test_the_teachers_prompt_may_be_messages_in_a_nested_field(tiny_olmo3: Path, tmp_path: Path) -> None:
    student, teacher = (load_tokenizer(ModelSettings(path=tiny_olmo3), role) for role in ("student", "teacher"))
    row = {"prompt": "1+1=", "answer": "2", "hints": {"full": [SYSTEM, USER]}}
    settings = write(tmp_path / "p.parquet", row)
    (prompt,) = stream_prompts(settings, student, teacher, teacher_prompt_field="hints.full")
    assert prompt.teacher_token_ids == student.encode(student.render((Turn(**SYSTEM), Turn(**USER))))
    assert prompt.student_token_ids == student.encode(student.render("1+1="))
    with pytest.raises(
        UserError, match=r"has no 'hints\.whole', which teacher\.prompt_field names; it has 'hints' with 'full'"
    ):
        list(stream_prompts(settings, student, teacher, teacher_prompt_field="hints.whole"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b", "whole name"),
        ("a.c", "inside"),
        ("list.1.value", "second"),
        ("text.x", "in JSON"),
        ("a.d", "has no 'a.d'.*; it has 'a' with 'b', 'c'"),
        ("list.2.value", "it has 'list' with 2 items, named by their numbers from 0"),
        ("a.c.d", "it has 'a.c', which is str and has no fields"),
        ("b.a", "it has 'a', 'a.b', 'list', 'text', 'answer'"),
    ],
)
def test_a_field_is_named_by_dots(tmp_path: Path, name: str, expected: str) -> None:
    values = [{"value": "first"}, {"value": "second"}]
    row = {"a": {"b": "1", "c": "inside"}, "a.b": "whole name", "list": values, "text": '{"x": "in JSON"}', "answer": 2}
    settings = write(tmp_path / "p.jsonl", row, prompt_field=name)
    if "it has" in expected:
        with pytest.raises(UserError, match=expected):
            read_problems(settings)
    else:
        assert [problem.text for problem in read_problems(settings)] == [expected]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([SYSTEM], "ends with a message of the system"),
        ([USER, SYSTEM, USER], "system message as message 2; it must be the first"),
        ([USER | {"role": "tool"}], "message 1 with role 'tool'; must be one of system, user, assistant"),
        ([USER | {"tool_calls": [1]}], "'tool_calls' in message 1"),
        ([USER | {"content": [{"type": "image"}]}], "content of type list in message 1"),
        ([USER | {"content": None}], "holds no text in message 1"),
        (["1+1="], "message 1 is str"),
        ([[USER]], "message 1 is list"),
        (USER, "must be text or a list of messages, not dict"),
    ],
)
def test_what_is_no_conversation_is_said(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation(value)


def test_a_conversation_is_written_as_it_is_read() -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]
    for value in ("1+1=", '[{"role": "user", "content": "x"}]', [SYSTEM, *SHOTS], [USER | {"content": parts}]):
        turns = conversation(value)
        assert conversation(as_value(turns)) == turns
    assert as_value(conversation([USER])) == "1+1="
    assert with_instruction(conversation(SHOTS), "!")[-1].content == "1+1=!"
