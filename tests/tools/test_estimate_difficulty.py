"""The command as users run it: batches do not matter, it continues where it stopped, mistakes are one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "estimate_difficulty.py"
sys.path.insert(0, str(TOOL.parent))

from estimate_difficulty import main  # noqa: E402  (the tools are commands, not a package)

PROMPTS = 12


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The answers are single characters, so that a random model is right now and then."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "answer": i % 10, "note": "kept"} for i in range(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, prompts: Path, output: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, str(TOOL), "--model", str(model), "--prompts", str(prompts), "--output", str(output)),
        *("prompts.template=plain", "rollouts.max_new_tokens=1", "rollouts.temperature=3", "device=cpu", *overrides),
    ]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)


def difficulties(output: Path) -> list[float]:
    return [json.loads(line)["difficulty"] for line in output.read_text().splitlines()]


def test_rows_keep_their_fields_and_batches_do_not_matter(tiny_olmo3: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "with.jsonl"
    done = run(command(tiny_olmo3, prompts, output, "samples=64"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    originals = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "difficulty"} for row in rows] == originals
    assert all(0 <= row["difficulty"] <= 1 and (row["difficulty"] * 64).is_integer() for row in rows)
    assert {row["difficulty"] for row in rows} != {1.0}
    provenance = json.loads((tmp_path / "out" / "with.jsonl.provenance.json").read_text())
    assert (provenance["samples"], provenance["seed"], provenance["grader_version"]) == (64, 0, "1")
    assert provenance["sampling"] == {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 1}
    assert sorted(path.name for path in output.parent.iterdir()) == ["with.jsonl", "with.jsonl.provenance.json"]

    # Continued from half of the prompts and a line that a kill cut short, in other batches
    partial, other = tmp_path / "other.jsonl.partial", tmp_path / "other.jsonl"
    measurement = {k: v for k, v in provenance.items() if k not in ("difficulty", "prompt_count")}
    passes = [{"id": str(i), "passes": round(64 * (1 - row["difficulty"]))} for i, row in enumerate(rows[:6])]
    lines = [{"measurement": measurement}, *passes]
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "6", "pas')
    done = run(command(tiny_olmo3, prompts, other, "samples=64", "rollouts.batch_size=128"))
    assert done.returncode == 0, done.stderr
    assert other.read_text() == output.read_text()
    assert not partial.exists()


def test_ctrl_c_loses_nothing(tiny_olmo3: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    # One prompt at a time with many samples, so that the signal finds it at work
    arguments = command(tiny_olmo3, prompts, output, "samples=3000", "rollouts.batch_size=64")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (partial.exists() and partial.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert 1 < partial.read_text().count("\n") < PROMPTS + 1
    assert run(arguments).returncode == 0
    assert len(difficulties(output)) == PROMPTS


def test_mistakes_are_one_line(
    tiny_olmo3: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / "begun.jsonl.partial").write_text('{"measurement": {"seed": 1}}\n')
    cases: list[tuple[Path, Path, Path, list[str], str]] = [
        (tiny_olmo3, tmp_path / "no.jsonl", output, [], "no such file"),
        (tmp_path, prompts, output, [], "no tokenizer there"),
        (tiny_olmo3, prompts, output, ["sample=3"], "did you mean samples?"),
        (tiny_olmo3, prompts, output, ["rollouts.temperature=0"], "samples=8: must be 1"),
        (
            tiny_olmo3,
            prompts,
            output,
            ["rollouts.engine=replay", "rollouts.path=x"],
            "must be an engine that generates",
        ),
        (tiny_olmo3, prompts, prompts, [], "exists already"),
        (tiny_olmo3, prompts, tmp_path / "begun.jsonl", [], "was begun with"),
    ]
    for model, asked, written, overrides, message in cases:
        with pytest.raises(SystemExit) as stopped:
            main(written, model, str(asked), None, ["prompts.template=plain", "rollouts.max_new_tokens=1", *overrides])
        errors = capsys.readouterr().err
        assert (stopped.value.code, message in errors) == (2, True), errors
        assert len(errors.strip().splitlines()) == 1
    assert not output.exists()


def test_exit_code_of_the_command(prompts: Path, tmp_path: Path) -> None:
    done = run(command(tmp_path, prompts, tmp_path / "out.jsonl"))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
