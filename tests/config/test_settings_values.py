"""A word means what the type of its setting says; one that seems to mean something else is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sead.config.run import dump_config, load_config
from megatron_sead.config.settings_file import repeated_overrides
from megatron_sead.errors import UserError
from tests.config.test_run import BASE, config, refusal


def value_of(key: str, *overrides: str) -> Any:
    value: Any = config(*overrides)
    for name in key.split("."):
        value = getattr(value, name)
    return value


NOTHING_MEANT = "write null for nothing; if the word is meant as text, put it in double quotes"
NO_BOOLEAN = "must be text, not a boolean; if"
NO_NUMBER = "must be a number, not a boolean"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        *((f"student.system_prompt={word}", NOTHING_MEANT) for word in ("None", "none", "nil", "undefined", "NaN")),
        *((f"prompts.instruction={word}", NO_BOOLEAN) for word in ("no", "Yes", "on", "OFF", "true", "False")),
        ("teacher.chat_template=None", NOTHING_MEANT),
        ("evaluation.path=none", NOTHING_MEANT),
        ("prompts.split=None", "must have a value; if the word is meant"),
        ("evaluation.limit=None", "write null for nothing"),
        ("training.recompute_granularity=none", "write null for nothing"),
        ("student.stop_token_ids=None", "write null for nothing"),
        ("student.stop_token_ids=[1, none]", "stop_token_ids.1='none': must be a valid integer"),
        ("curriculum.mode=None", "'competence_cdf', 'mastery' or 'none'"),
        ("curriculum.mode=null", "'competence_cdf', 'mastery' or 'none'"),
        *((f"training.steps={word}", NO_NUMBER) for word in ("true", "yes", "Off")),
        ("zones.shares=[50, 49, on]", NO_NUMBER),
        ("rollouts.temperature=off", NO_NUMBER),
        ("training.steps=012", "must not begin with 0"),
        ("training.steps=12:30", "valid integer"),
        ("training.lr=1:30", "valid number"),
        ("training.lr=1e400", "finite"),
        ("training.lr=nan", "finite"),
        ("training.lr=5%", "valid number"),
        (f"training.steps={'9' * 5000}", "finite"),
        ("training.steps=null", "training.steps=null: must have a value"),
        ("reporting.tensorboard=None", "valid boolean"),
        ("zones.shares=50,40,10", "must be a list, for example [50, 40, 10]"),
        ("student.stop_token_ids=5", "valid list"),
        ("prompts.answer_field=", "at least 1 character"),
        ("parallel=null", "must be a group of settings: tensor_model_parallel_size"),
        ("--training.steps=10", "did you mean training.steps?"),
        ("training.global-batch-size=8", "did you mean training.global_batch_size?"),
        ("student.system_prompt=\udcff", "is not UTF-8 text"),
        ('student.system_prompt="\\ud83d"', "is not UTF-8 text"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_what_means_something_else_than_it_seems_is_refused(override: str, told: str) -> None:
    assert told in refusal(override)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        *((f"student.system_prompt={word}", None) for word in ("", "~", "null", "Null", "NULL")),
        ("student.system_prompt='None'", "None"),
        ("student.system_prompt='\"None\"'", '"None"'),
        ('prompts.instruction="no"', "no"),
        ("prompts.instruction=", ""),
        ("prompts.instruction=Answer: in a # box", "Answer: in a # box"),
        ("prompts.instruction=@a [b", "@a [b"),
        ("prompts.instruction=Say yes or no", "Say yes or no"),
        ("prompts.subset=2024-01-01", "2024-01-01"),
        ("prompts.subset=012", "012"),
        ("prompts.split=1_000", "1_000"),
        ("prompts.id_field=12:30:00", "12:30:00"),
        ("prompts.answer_field=y", "y"),
        ("output=2024", Path("2024")),
        ("training.steps = 20", 20),
        ("training.steps=1e3", 1000),
        ("training.steps=1_000", 1000),
        ("training.steps='20'", 20),
        ("seed=1.0", 1),
        ("training.lr=1e-6", 1e-6),
        ("training.lr=1", 1.0),
        ("curriculum.mode=none", "none"),
        ("teacher.offload=off", False),
        ("reporting.tensorboard=Yes", True),
        ("parallel={tensor_model_parallel_size: 2}", None),
    ],
)
def test_what_is_evidently_meant_is_done_and_recorded(override: str, value: Any, tmp_path: Path) -> None:
    key = override.partition("=")[0].strip()
    if key != "parallel":
        assert value_of(key, override) == value
    loaded = config(override)
    (tmp_path / "config.yaml").write_text(dump_config(loaded), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml", []) == loaded


def test_a_group_as_an_override_changes_what_it_names_and_nothing_else() -> None:
    loaded = config("zones.scope=sequence", "zones={shares: [60, 30, 10]}")
    assert (loaded.zones.scope, loaded.zones.shares) == ("sequence", (60, 30, 10))


def test_a_setting_given_twice_is_told_and_the_last_counts() -> None:
    overrides = ["seed=1", "output=a", "seed=1", "output=b"]
    assert repeated_overrides(overrides) == ["output is given 2 times (a, b); the last counts"]
    assert value_of("output", *overrides) == Path("b")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("? [a, b]\n: 1\n", "run.yaml, line 1, column 3: a key must be a word, not a list or a group"),
        ("zones: {{a: 1}: 2}\n", "a key must be a word"),
        ("training.steps: 10\n", "training.steps: in a file, settings stand under their group"),
        ("1: 2\n", "1: unknown setting"),
        ("on: 2\n", "on: unknown setting"),
        ("zones:\n  shares: &a [*a]\n", "holds itself"),
        ("zones:\n  shares: " + "[" * 3000 + "\n", "nested too deeply"),
        ("prompts: {subset: 2024-13-45, split: None}\n", "prompts.split=None: must have a value"),
        ("seed: !!python/object:os.system 1\n", "could not determine a constructor"),
        ("--- {}\n--- {}\n", "run.yaml, line 2"),
        ("seed: \x00\n", "special characters are not allowed"),
    ],
    ids=lambda text: text[:20],
)
def test_an_odd_file_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml", list(BASE))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_whose_lines_are_all_comments_is_as_if_not_there(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("zones:\n  # shares: [1, 2, 3]\nprompts: {subset: 2024-01-01, split: 010}\n")
    loaded = load_config(tmp_path / "run.yaml", list(BASE))
    assert loaded.zones == config().zones
    assert (loaded.prompts.subset, loaded.prompts.split) == ("2024-01-01", "010")
