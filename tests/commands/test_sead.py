"""`sead` and its subcommands: the list costs nothing, mistakes are one line, files in tools/ are the same commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import typer

from megatron_sead.commands.cli import App, one_line_errors, told
from megatron_sead.commands.sead import COMMANDS, main
from megatron_sead.errors import ArgumentError, UserError

ROOT = Path(__file__).parents[2]
TOOLS = {
    "plan": "plan",
    "convert_checkpoint": "convert",
    "estimate_difficulty": "difficulty",
    "evaluate": "evaluate",
    "prepare_prompts": "prepare",
}


def sead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["sead", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    return int(left.value.code or 0), told.out, told.err


def test_what_is_installed_as_sead_is_this_command() -> None:
    named = re.search(r'"sead = (\S+:\S+)"', (ROOT / "setup.py").read_text())
    assert named is not None
    assert resolve_name(named[1]) is main


def test_the_list_of_commands_imports_none_of_them() -> None:
    code = """if True:
        import sys
        from megatron_sead.commands.sead import main
        sys.argv = ["sead", "--help"]
        try:
            main()
        finally:
            print(sorted({"typer", "pydantic", "rich", "yaml", "torch"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_has_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = sead(capsys, monkeypatch, name, "--help")
    assert code == 0
    assert "usage: " in out.lower()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plann"], "sead plann: no such command; did you mean plan?"),
        (["x"], f"sead x: no such command; must be one of {', '.join(COMMANDS)}"),
        (["plan"], "Missing option '--config'; see sead plan --help"),
        (["plan", "--conf", "x"], "No such option: --conf (Possible options: --config); see sead plan --help"),
        (
            ["train", "--config", "x", "--training.lr=1e-5"],
            "--training.lr: settings are written without dashes: training.lr=...; see sead train --help",
        ),
        (
            ["difficulty", "--seed", "1"],
            "--seed: settings are written without dashes: seed=...; see sead difficulty --help",
        ),
        (["convert", "inspekt"], "No such command 'inspekt'"),
        (["convert", "inspect"], "Missing argument 'directory'; see sead convert inspect --help"),
        (["convert", "inspect", "setup.py"], "setup.py: is a file; must be a directory"),
        (["convert", "truncate", "--input", "x", "--output", "y", "--layers", "many"], "Invalid value for '--layers'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_told_in_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if "inspect" in arguments:
        monkeypatch.setattr("megatron_sead.commands.model_checks.prepare_megatron", lambda: None)
    code, out, err = sead(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}"), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_in_tools_is_the_command(tool: str) -> None:
    text = (ROOT / "tools" / f"{tool}.py").read_text()
    assert f"from megatron_sead.commands.{TOOLS[tool]} import app\n" in text
    assert len(text.splitlines()) < 8


def test_an_argument_is_told_as_the_option_that_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(ArgumentError("max_shard_size", "5X", "must be a size")) == "error: --max-shard-size 5X: must be a size"
    assert told(UserError("out: exists", remedy="overwrite")).startswith("error: out: exists (or give --overwrite to")
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("a=1: wrong\nb=2: wrong")
    assert capsys.readouterr().err == "error: a=1: wrong\nerror: b=2: wrong\n"


def test_exit_codes_of_a_command_arrive() -> None:
    app = App()

    @app.command()
    def main(code: int) -> None:
        raise typer.Exit(code)

    for code in (0, 3):
        with pytest.raises(SystemExit) as left:
            app([str(code)], prog_name="x")
        assert left.value.code == code


def test_mixed_types_are_told_with_the_option_that_makes_them_one() -> None:
    line = told(UserError("model: holds float32, float64", remedy="dtype"))
    assert line == "error: model: holds float32, float64 (sead convert hf-to-megatron --dtype makes it so)"
