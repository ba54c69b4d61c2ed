"""The picture of a run shows its numbers and its zones, and takes the place of no file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "examples" / "tiny" / "student"
sys.path.insert(0, str(ROOT / "tools"))

from plot_run import COLOURS, COLUMNS, app, draw, find_rollout, placed, token_texts  # noqa: E402  (a command)

METRICS = [
    {"step": step, "pass_rate": step / 4, "competence": step / 8, "eligible_prompts": 2 + step} for step in range(4)
]
SUMMARY = {"steps": 4, "accuracy_before": 0.25, "accuracy_after": 0.5, "accuracy_teacher": None}
TEXT = "2+2=4; \\boxed{4}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the command reads of a run directory."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    record = {"prompt_token_ids": tokenizer.encode("Mod ten: 2+2="), "response_token_ids": tokens, "correct": True}
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    for step in (2, 10):
        records = [
            record | {"prompt_id": f"p{step}-{n}", "zones": ("ABC" * len(tokens))[: len(tokens)]} for n in range(2)
        ]
        (folder / f"rollouts/step-{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "student-hf").symlink_to(STUDENT)
    return folder


def test_the_last_recorded_rollout_is_shown_token_by_token(run: Path) -> None:
    record = find_rollout(run, None, None)
    assert (record["step"], record["prompt_id"]) == (10, "p10-0")
    (prompt, nothing), *response = token_texts(run / "student-hf", record)
    assert (prompt, nothing) == ("Mod ten: 2+2=", "")
    assert "".join(text for text, _ in response) == TEXT
    assert "".join(zone for _, zone in response) == record["zones"]


def test_every_token_stands_on_the_colour_of_its_zone(run: Path) -> None:
    record = find_rollout(run, 2, "p2-1")
    texts = token_texts(run / "student-hf", record)
    curve, rollout = draw(METRICS, SUMMARY, record, texts).axes
    drawn = [patch.get_facecolor() for patch in rollout.patches]
    from matplotlib.colors import to_rgba

    assert drawn == [to_rgba(COLOURS.get(zone, "white")) for _, zone in texts]
    by_label = {line.get_label(): line.get_xydata().tolist() for line in curve.lines}
    assert by_label["pass rate of a step's rollouts"] == [[0, 0], [1, 0.25], [2, 0.5], [3, 0.75]]
    assert by_label["greedy accuracy, held-out, before and after"] == [[0, 0.25], [4, 0.5]]
    assert "the teacher's" not in by_label  # it was not measured


def test_long_texts_are_broken_and_what_does_not_fit_is_left_out() -> None:
    (first, second), *rest = (
        [(line, text) for line, _, text, _ in placed([("p" * (COLUMNS + 1), ""), ("r", "A")])][:2],
        1,
    )
    assert (first, second) == ((0, "p" * COLUMNS), (1, "p")) and rest
    lines = [line for line, *_ in placed([("question", ""), *[("1234567", "B")] * 1000])]
    assert lines == sorted(lines) and max(lines) < 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--output", "x.txt"], "--output x.txt: must end in one of "),
        (["--output", "taken.svg"], "taken.svg: exists already"),
        (["--output", "x.svg", "--step", "3"], "step-3.jsonl: cannot be read"),
        (["--output", "x.svg", "--prompt", "q"], "--prompt q: "),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.svg").write_text("mine")
    done = CliRunner().invoke(app, [str(run), *arguments])
    assert done.exit_code == 2 and told in done.output and done.output.count("\n") == 1, done.output
    assert (tmp_path / "taken.svg").read_text() == "mine"
    assert not (tmp_path / "x.svg").exists()


def test_the_picture_is_written(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(run), "--output", str(tmp_path / "new" / "run.svg")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "run.svg").read_text().startswith("<?xml")
