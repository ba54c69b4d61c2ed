"""Commands say what they have to on any terminal, expand paths that a shell has not, and take odd variables calmly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_sead.commands.cli import App
from tests.training.launching import ROOT, SHORT, TINY

CHECK = [sys.executable, "-m", "megatron_sead.train", "--config", str(TINY), *SHORT, "--check"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, check=False, env=os.environ | environment, cwd=ROOT)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters_is_given_escapes(encoding: str, tmp_path: Path) -> None:
    narrow = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = run([*CHECK, f"output={tmp_path / 'run'}", f"prompts.path={tmp_path}/训练-\u2603.jsonl"], **narrow)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"\\u8bad\\u7ec3-\\u2603.jsonl: no such file" in done.stderr
    program = (
        'from megatron_sead.commands.cli import App\n@(app := App()).command()\ndef main():\n print("+- ± ☃ ─")\napp()'
    )
    shown = run([sys.executable, "-c", program], **narrow)
    assert shown.returncode == 0, shown.stderr
    assert b"\\u2603 \\u2500" in shown.stdout


def test_tables_are_drawn_on_an_ascii_terminal() -> None:
    done = run(
        [sys.executable, "tools/plan.py", "--config", str(TINY), "--world-size", "2"],
        PYTHONIOENCODING="ascii",
        PYTHONUTF8="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    command = " ".join(CHECK[:-1]) + f" output={tmp_path / 'run'} --dry-run"
    for redirection in (">&-", ">&- 2>&-", "| head -0"):
        done = run(["bash", "-c", f"set -o pipefail; {command} {redirection}"])
        assert done.returncode in (0, 1), redirection
        assert b"Traceback" not in done.stderr
        assert b"Exception" not in done.stderr


def test_paths_of_a_command_line_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    monkeypatch.setenv("HOME", "/home/somebody")

    @app.command()
    def main(paths: list[Path], output: Path = Path("runs"), name: str = "~") -> None:
        typer.echo([*map(str, paths), str(output), name])

    done = CliRunner().invoke(app, ["~/a", "b", "--output", "$HOME/c"])
    assert done.output == "['/home/somebody/a', 'b', '/home/somebody/c', '~']\n"
    done = CliRunner().invoke(app, ["a", "--output", "$NOT_SET/c"])
    assert done.exit_code == 2
    assert done.stderr == "error: '$NOT_SET/c' the environment variable NOT_SET is not set\n"


@pytest.mark.parametrize(("name", "text"), [("NPROC", "abc"), ("NNODES", "x"), ("WORLD_SIZE", ""), ("NPROC", "0")])
def test_a_variable_that_is_no_number_is_told_in_one_line(name: str, text: str) -> None:
    done = run(CHECK, **({"NPROC": "2"} | {name: text}))
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"error: {name}='{text}' (environment variable): must be a whole number")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "variables",
    [{"NPROC": "abc"}, {"NPROC": "0"}, {"NPROC": "2", "NNODES": "x"}, {"NPROC": "1", "NNODES": "2", "NODE_RANK": "a"}],
    ids=str,
)
def test_the_scripts_tell_a_variable_that_is_no_number(variables: dict[str, str]) -> None:
    script = "set -euo pipefail; VENV_PYTHON=true; source examples/launch.sh; MASTER_ADDR=a launch config"
    done = run(["bash", "-c", script], **variables)
    name, text = list(variables.items())[-1]
    assert done.returncode == 2
    assert (
        done.stderr.decode()
        == f"error: {name}='{text}': must be a whole number of at least {int(name != 'NODE_RANK')}\n"
    )


@pytest.mark.parametrize(
    ("option", "text"), [("--nproc-per-node", "abc"), ("--nproc-per-node", "0"), ("--nnodes", "x")]
)
def test_the_launcher_tells_ranks_that_are_no_number(option: str, text: str) -> None:
    done = run([sys.executable, "-m", "megatron_sead.launch", option, text, "program.py"])
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"error: {option} {text}: must be a number")
