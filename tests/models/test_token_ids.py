"""Tokens that a model has no row for are told in one line: by the run when it loads the tokenizer, and by --check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_sead.config.run import ModelSettings, load_config
from megatron_sead.errors import UserError
from megatron_sead.planning.tokenizer_files import tokenizer_problems
from megatron_sead.prompts.pair import check_pair
from megatron_sead.prompts.tokenizer import load_tokenizer
from tests.training.launching import TINY

ROWS = 61  # of the tiny model's embedding, one for each token


@pytest.fixture
def model(tiny_olmo3: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(tiny_olmo3, tmp_path / "model"))
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == ROWS
    return directory


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Set fields of one of the model's JSON files."""

    def apply(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))

    return apply


def add_token(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|more|>"])
    tokenizer.save(str(directory / "tokenizer.json"))


def add_to_vocabulary(directory: Path) -> None:
    definition = json.loads((directory / "tokenizer.json").read_text())
    definition["model"]["vocab"] |= {"zz": ROWS, "zzz": ROWS + 1}
    (directory / "tokenizer.json").write_text(json.dumps(definition))


def changes(*several: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda directory: [apply(directory) for apply in several] and None


def tokenizer_settings(**values: Any) -> Callable[[Path], None]:
    return change("tokenizer_config.json", **values)


NO_EOS = change("generation_config.json", eos_token_id=None)
REFUSED: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "an added token": (
        add_token,
        {},
        rf"token {ROWS} '<\|more\|>' is not among the model's {ROWS} .*resize the model's",
    ),
    "a larger vocabulary": (add_to_vocabulary, {}, f"token {ROWS} 'zz' is not among.*, and 1 more beyond it"),
    "a new padding token": (
        tokenizer_settings(pad_token="[PAD]"),
        {},
        rf"token {ROWS} '\[PAD\]' is not among the model's",
    ),
    "one listed": (
        tokenizer_settings(extra_special_tokens=["<t>"]),
        {},
        f"token {ROWS} '<t>' is not among the model's",
    ),
    "a smaller model": (change("config.json", vocab_size=50), {}, "token 50 '.' is not among the model's 50"),
    "stop beyond": (changes(), {"stop_token_ids": [1, 999]}, "stop_token_ids: stop token 999 is not among"),
    "stop at the end": (changes(), {"stop_token_ids": [ROWS]}, f"stop_token_ids: stop token {ROWS} is not among"),
    "stop negative": (changes(), {"stop_token_ids": [-1]}, "stop_token_ids: stop token -1 is not among"),
    "eos beyond": (change("generation_config.json", eos_token_id=[1, 70]), {}, "generation_config.json: stop token 70"),
    "eos as text": (
        change("generation_config.json", eos_token_id="</s>"),
        {},
        "generation_config.json: eos_token_id '</s>'",
    ),
    "eos of several types": (
        change("generation_config.json", eos_token_id=[1, "3"]),
        {},
        r"eos_token_id \[1, '3'\] is not",
    ),
    "eos and null": (
        change("generation_config.json", eos_token_id=[None, 1]),
        {},
        "eos_token_id .None, 1. is not among",
    ),
    "eos true": (change("generation_config.json", eos_token_id=True), {}, "eos_token_id True is not among"),
    "eos 1.0": (change("generation_config.json", eos_token_id=1.0), {}, "eos_token_id 1.0 is not among"),
    "eos of config.json": (
        changes(NO_EOS, change("config.json", eos_token_id=-5)),
        {},
        "config.json: eos_token_id -5 is",
    ),
    "padding at the end": (
        change("config.json", pad_token_id=ROWS),
        {},
        f"pad_token_id {ROWS} is not among .* from 0 to 60",
    ),
    "padding negative": (
        change("config.json", pad_token_id=-100),
        {},
        "pad_token_id -100 is not among the model's tokens",
    ),
    "padding as text": (change("config.json", pad_token_id="<|pad|>"), {}, "pad_token_id '<|pad|>' is not among"),
    "unused eos 1.0": (change("config.json", eos_token_id=1.0), {}, "config.json: eos_token_id 1.0 is not among"),
    "unused bos": (
        change("config.json", bos_token_id="<s>"),
        {"stop_token_ids": [1]},
        "bos_token_id '<s>' is not among",
    ),
    "generation's padding": (
        change("generation_config.json", pad_token_id="x"),
        {},
        "config.json: pad_token_id 'x' is",
    ),
    "padding in a list": (change("config.json", pad_token_id=[0]), {}, r"config.json: pad_token_id \[0\] is not among"),
    "broken JSON": (
        lambda d: (d / "generation_config.json").write_text("{") and None,
        {},
        "generation_config.json: not valid",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_token_that_the_model_does_not_know_is_told(model: Path, case: str) -> None:
    apply, settings, told = REFUSED[case]
    apply(model)
    with pytest.raises(UserError, match=told) as caught:
        load_tokenizer(ModelSettings(path=model, **settings), "student")
    checked = tokenizer_problems(pair(model, model, **settings))
    assert checked and str(caught.value) == checked[0]
    assert "\n" not in checked[0]


def pair(student: Path, teacher: Path, **settings: Any) -> Any:
    chosen = [f"student.{name}={value}" for name, value in settings.items()]
    return load_config(TINY, [f"student.path={student}", f"teacher.path={teacher}", *chosen])


@pytest.mark.parametrize(
    ("apply", "pad"),
    [
        (change("config.json", vocab_size=128), 0),  # padded rows
        (change("config.json", pad_token_id=-1), 0),
        (changes(change("config.json", pad_token_id=-1), tokenizer_settings(pad_token=None)), 1),
        (changes(change("config.json", pad_token_id=None), tokenizer_settings(pad_token=None)), 1),
        (changes(change("config.json", pad_token_id=5), tokenizer_settings(pad_token=None)), 5),
        (changes(NO_EOS, change("config.json", eos_token_id=[3])), 0),
        (changes(change("generation_config.json", eos_token_id=[]), change("config.json", eos_token_id=None)), 0),
    ],
)
def test_what_fits_passes(model: Path, apply: Callable[[Path], None], pad: int) -> None:
    apply(model)
    assert load_tokenizer(ModelSettings(path=model), "student").pad_token_id == pad
    assert tokenizer_problems(pair(model, model)) == []


def test_a_setting_makes_up_for_a_file(model: Path) -> None:
    change("generation_config.json", eos_token_id="</s>")(model)
    assert load_tokenizer(ModelSettings(path=model, stop_token_ids=[3]), "student").stop_token_ids == (3,)


def test_a_chat_template_that_is_not_there_is_told_by_check(model: Path) -> None:
    told = tokenizer_problems(pair(model, model, chat_template=model / "no.jinja"))
    assert told == [f"student.chat_template={model / 'no.jinja'}: cannot be read: no such file"]


def test_embeddings_of_two_sizes_are_told(model: Path, tiny_olmo3: Path) -> None:
    change("config.json", vocab_size=64)(model)
    settings = [ModelSettings(path=tiny_olmo3), ModelSettings(path=model)]
    told = f"vocab_size is {ROWS} in {tiny_olmo3} and 64 in {model}; student and teacher must have the same vocabulary"
    with pytest.raises(UserError) as caught:
        check_pair(load_tokenizer(settings[0], "student"), load_tokenizer(settings[1], "teacher"), *settings, "plain")
    assert [str(caught.value)] == [told] == tokenizer_problems(pair(tiny_olmo3, model))
