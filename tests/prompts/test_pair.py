"""Every difference between the two models is refused, or is there because a setting says so."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.pair import PairReport, check_pair
from megatron_sead.prompts.tokenizer import load_tokenizer

pytestmark = pytest.mark.transformers_lane


@pytest.fixture
def other(tiny_olmo3: Path, tmp_path: Path) -> Path:
    """The teacher: a copy of the student, for a test to change."""
    return Path(shutil.copytree(tiny_olmo3, tmp_path / "teacher"))


def check(
    student: Path,
    teacher: Path,
    template: Literal["chat", "plain"] = "chat",
    student_changes: dict[str, Any] | None = None,
    teacher_changes: dict[str, Any] | None = None,
) -> PairReport:
    ours = ModelSettings(path=student, **(student_changes or {}))
    theirs = ModelSettings(path=teacher, **(teacher_changes or {}))
    return check_pair(load_tokenizer(ours, "student"), load_tokenizer(theirs, "teacher"), ours, theirs, template)


def verdicts(report: PairReport) -> dict[str, str]:
    return {aspect.name: aspect.verdict for aspect in report.aspects}


def test_a_copy_is_the_same(tiny_olmo3: Path, other: Path) -> None:
    report = check(tiny_olmo3, other)
    assert set(verdicts(report).values()) == {"same"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    assert "stops on" in console.export_text()


def swap_tokens(definition: dict[str, Any]) -> None:
    vocabulary = definition["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]


def swap_merges(definition: dict[str, Any]) -> None:
    merges = definition["model"]["merges"]
    merges[0], merges[2] = merges[2], merges[0]


def drop_merge(definition: dict[str, Any]) -> None:
    definition["model"]["merges"].pop()


def add_token(definition: dict[str, Any]) -> None:
    definition["model"]["vocab"]["zz"] = len(definition["model"]["vocab"])


def split_digits(definition: dict[str, Any]) -> None:
    definition["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_tokens, "token 11 is '7' for the student and '8' for the teacher"),
        (swap_merges, "merge 0 is 'b o' for the student and '1 0' for the teacher"),
        (drop_merge, "merge 2 is '1 0' for the student and nothing for the teacher"),
        (add_token, "is nothing for the student and 'zz' for the teacher"),
        (split_digits, "not the same pre_tokenizer"),
    ],
)
def test_different_tokenizers_are_refused_always(
    tiny_olmo3: Path,
    other: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
    template: Literal["chat", "plain"],
) -> None:
    file = other / "tokenizer.json"
    definition = json.loads(file.read_text())
    change(definition)
    file.write_text(json.dumps(definition))
    model = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(model | {"vocab_size": 64}))  # with a row for a token more
    settings = {"stop_token_ids": [1], "system_prompt": "x"}
    with pytest.raises(UserError, match=message):
        check(tiny_olmo3, other, template, settings, settings)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_different_stop_tokens(tiny_olmo3: Path, other: Path, template: Literal["chat", "plain"]) -> None:
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    with pytest.raises(UserError, match=r"1 <\|endoftext\|>, 3 <\|im_end\|> and 1 <\|endoftext\|>.*stop_token_ids"):
        check(tiny_olmo3, other, template)
    assert verdicts(check(tiny_olmo3, other, template, None, {"stop_token_ids": [3, 1]}))["stops on"] == "same"
    assert verdicts(check(tiny_olmo3, other, template, {"stop_token_ids": [1]}))["stops on"] == "same"
    kept = check(tiny_olmo3, other, template, {"stop_token_ids": [1, 3]})
    assert verdicts(kept)["stops on"] == "mapped by config"


def test_different_chat_templates(tiny_olmo3: Path, other: Path) -> None:
    file = other / "chat_template.jinja"
    file.write_text("I am a model. " + file.read_text())
    with pytest.raises(UserError, match=r"differ from character 0 of the prompt on.*'I am a model.*chat_template"):
        check(tiny_olmo3, other)
    assert verdicts(check(tiny_olmo3, other, "plain"))["chat template"] == "not used"
    mapped = check(tiny_olmo3, other, "chat", {"chat_template": file})
    assert verdicts(mapped)["chat template"] == "same"
    kept = check(tiny_olmo3, other, "chat", None, {"chat_template": file})
    assert verdicts(kept)["chat template"] == "mapped by config"


def test_templates_that_write_the_same_prompt_are_one(tiny_olmo3: Path, other: Path) -> None:
    file = other / "chat_template.jinja"
    file.write_text("{# by another hand #}" + file.read_text())
    assert verdicts(check(tiny_olmo3, other))["chat template"] == "same prompt"


def test_different_system_prompts_are_meant(tiny_olmo3: Path, other: Path) -> None:
    report = verdicts(check(tiny_olmo3, other, "chat", None, {"system_prompt": "be good"}))
    assert report["system prompt"] == "mapped by config"
    assert report["a prompt"] == "mapped by config"
