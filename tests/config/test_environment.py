"""Paths expand as in a shell, or are refused; a number in a variable is a number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sead.config.environment import check_rank_variables, environment_number, expand_path
from megatron_sead.config.run import dump_config, load_config
from megatron_sead.errors import UserError
from tests.config.test_run import config, refusal

PATHS = ["output", "student.path", "student.tokenizer", "student.chat_template", "teacher.path", "teacher.tokenizer"]
PATHS += ["teacher.chat_template", "prompts.path", "evaluation.path", "rollouts.path"]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATA", "/data/x y")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize("key", PATHS)
def test_every_path_setting_expands_and_records_what_it_became(key: str, tmp_path: Path) -> None:
    engine = ["rollouts.engine=replay"] if key == "rollouts.path" else []
    loaded = config(*engine, f"{key}=~/$DATA/${{DATA}}")
    group, _, name = key.rpartition(".")
    value = getattr(getattr(loaded, group) if group else loaded, name)
    assert Path(value) == Path("/home/somebody/data/x y/data/x y")
    (tmp_path / "config.yaml").write_text(dump_config(loaded))
    assert "~" not in dump_config(loaded)
    assert load_config(tmp_path / "config.yaml", []) == loaded
    assert refusal(*engine, f"{key}=$UNSET/a") == f"{key}='$UNSET/a': the environment variable UNSET is not set"
    assert refusal(*engine, f"{key}=s3://bucket/a").startswith(f"{key}='s3://bucket/a': is no path on this machine")


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("~", "/home/somebody"),
        ("~root/a", os.path.expanduser("~root/a")),
        ("runs/a", "runs/a"),
        ("../a/~/b", "../a/~/b"),
        (".", "."),
        ("./", "./"),
        ("..", ".."),
        ("$DATA/a", "/data/x y/a"),
        ("${DATA}a", "/data/x ya"),
        ("allenai/dolma", "allenai/dolma"),
        ("Läufe/训练", "Läufe/训练"),
        ("a:b", "a:b"),
    ],
)
def test_what_is_expanded(text: str, expanded: str) -> None:
    assert expand_path(text) == expanded
    assert expand_path(Path(text)) == str(Path(expanded))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (" a", "begins or ends with a space"),
        ("a\n", "begins or ends with a space"),
        ("a\0b", "a character that cannot be shown"),
        ("a\udcffb", "a character that cannot be shown"),
        ("$UNSET", "UNSET is not set"),
        ("$EMPTY/a", "EMPTY is empty"),
        ("$DATA/${DATA:-a}", "only $NAME and ${NAME}"),
        ("$(pwd)/a", "only $NAME and ${NAME}"),
        ("a$", "only $NAME and ${NAME}"),
        ("~nobody-of-that-name/a", "no home directory of ~nobody-of-that-name"),
        ("./~nobody-of-that-name", "no home directory of ~nobody-of-that-name"),
        ("file:///a", "no path on this machine"),
        ("hf://datasets/a", "no path on this machine"),
        ("https://a/b", "no path on this machine"),
        ("host:/a", "no path on this machine"),
        ("me@host:/a", "no path on this machine"),
        ("C:\\a", "no path on this machine"),
        ("C:/a", "no path on this machine"),
        ("a\\b", "holds \\"),
        ("a/*.jsonl", "holds *"),
        (None, "null, which is also what ~ alone means"),
        (5, "as text"),
    ],
)
def test_what_is_refused(text: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        expand_path(text)
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["", "abc", "-1", "0", "1.5", "1_0", " 2", "٣", "9" * 20])
def test_a_variable_that_is_no_number_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", text)
    with pytest.raises(UserError, match=r"^NPROC='.*' \(environment variable\): must be a whole number of at least 1$"):
        environment_number("NPROC")


def test_a_variable_that_is_a_number_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "08")
    assert environment_number("NPROC") == 8
    assert environment_number("UNSET", 3) == 3


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE='two' (environment variable): must be a whole number"),
        ("RANK", "", "RANK='' (environment variable): must be a whole number of at least 0"),
        ("MASTER_PORT", "x", "MASTER_PORT='x' (environment variable)"),
        ("MASTER_ADDR", None, "RANK is set and MASTER_ADDR is not; torchrun sets all"),
    ],
)
def test_a_rank_that_cannot_meet_the_others_is_told(
    name: str, text: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    check_rank_variables()
    if text is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError) as caught:
        check_rank_variables()
    assert told in str(caught.value)
