"""A picture of a run: ``python tools/plot_run.py RUN --output FILE.svg``. How it learnt, and a rollout by its zones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.files.outputs import require_free
from megatron_sead.rollouts.records import FOLDER, record_path

INK = "#222222"
COLOURS = {"A": "#dcdcdc", "B": "#8fc1ec", "C": "#f6ad55"}  # told apart by people who do not see all colours, too
MEANINGS = {
    "A": "A: both sure, nothing to learn",
    "B": "B: student unsure, reverse KL",
    "C": "C: teacher unsure too, forward and reverse KL",
}
COLUMNS, LINES = 32, 10  # characters that fit beside the curve; what is beyond is left out
MONOSPACE = 0.602  # width of a character of DejaVu Sans Mono over the size of its font

app = App()


@app.command()
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run that has ended")],
    output: Annotated[Path, typer.Option(help="picture to write, by its ending: .svg, .png, .pdf")],
    step: Annotated[int | None, typer.Option(min=0, help="whose rollout; default: the last one recorded")] = None,
    prompt: Annotated[str | None, typer.Option(help="id of the rollout's prompt; default: the first one")] = None,
) -> None:
    """Pass rate and held-out accuracy beside a rollout."""
    with one_line_errors():
        kinds = Figure().canvas.get_supported_filetypes()
        kind = output.suffix.lower().removeprefix(".")
        if kind not in kinds:
            raise ArgumentError("output", output, f"must end in one of {', '.join(f'.{k}' for k in sorted(kinds))}")
        require_free(output)
        metrics = [json.loads(line) for line in _read(run / "metrics.jsonl").splitlines()]
        summary = json.loads(_read(run / "summary.json"))
        record = find_rollout(run, step, prompt)
        figure = draw(metrics, summary, record, token_texts(run / "student-hf", record))
        output.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.rcParams["svg.hashsalt"] = "run"  # the same picture is the same file
        with open(output, "xb") as file:
            figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the directory of a run that has ended"
        ) from None


def find_rollout(run: Path, step: int | None, prompt: str | None) -> dict[str, Any]:
    """The record of a rollout, with the step that it is of.

    Raises:
        UserError: the run has recorded none, or not this one.
    """
    recorded = sorted(int(p.stem.removeprefix("step-")) for p in (run / FOLDER).glob("step-*.jsonl"))
    if not recorded:
        raise UserError(f"{run / FOLDER}: no rollouts are recorded; reporting.rollouts_interval of the run says when")
    step = recorded[-1] if step is None else step
    path = record_path(run, step)
    for line in _read(path).removesuffix("\n").split("\n"):
        record = json.loads(line)
        if prompt in (None, record["prompt_id"]):
            return record | {"step": step}
    raise ArgumentError("prompt", prompt, f"{path} holds no rollout of it")


def token_texts(student: Path, record: dict[str, Any]) -> list[tuple[str, str]]:
    """(text, zone) of the prompt, whose zone is empty, then of each token of the response."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    prompt = tokenizer.decode(record["prompt_token_ids"], skip_special_tokens=True)
    response = [tokenizer.decode([token]) for token in record["response_token_ids"]]
    return [(prompt, ""), *zip(response, record["zones"], strict=True)]


def draw(
    metrics: list[dict[str, Any]], summary: dict[str, Any], record: dict[str, Any], texts: list[tuple[str, str]]
) -> Figure:
    """Both halves, on white whatever surrounds them."""
    figure = Figure(figsize=(10, 3.8), layout="constrained", facecolor="white")
    curve, rollout = figure.subplots(1, 2, width_ratios=(1.1, 1))
    draw_curve(curve, metrics, summary)
    right = "right" if record["correct"] else "wrong"
    rollout.set_title(f"a rollout of step {record['step']}; its answer is {right}", loc="left", color=INK)
    rollout.set(xlim=(0, COLUMNS), ylim=(LINES, 0))
    rollout.axis("off")
    handles = [Patch(facecolor=COLOURS[zone], label=text) for zone, text in MEANINGS.items()]
    rollout.legend(handles=handles, fontsize=10, loc="lower left", frameon=False)
    figure.draw_without_rendering()  # the text's size depends on the room that the layout leaves
    figure.set_layout_engine("none")
    draw_rollout(rollout, texts, rollout.get_window_extent().width / figure.dpi)
    return figure


def draw_curve(axis: Axes, metrics: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Pass rates of the steps, what the curriculum had opened, and greedy accuracy where it was measured."""
    steps = [line["step"] for line in metrics]
    most = max(line["eligible_prompts"] for line in metrics)
    opened = [line["eligible_prompts"] / most for line in metrics]
    axis.fill_between(steps, opened, step="post", color="#f1f1f1", label="prompts open, of those ever open")
    axis.plot(
        steps, [line["pass_rate"] for line in metrics], ".", color="#9db8d2", label="pass rate of a step's rollouts"
    )
    axis.plot(steps, [line["competence"] for line in metrics], color="#1f5a94", label="the same, smoothed")
    known = [
        (step, summary[f"accuracy_{name}"])
        for name, step in (("before", 0), ("after", summary["steps"]))
        if summary[f"accuracy_{name}"] is not None
    ]
    if known:
        axis.plot(
            *zip(*known, strict=True),
            "D",
            color="#c05621",
            clip_on=False,
            zorder=3,
            label="greedy accuracy, held-out, before and after",
        )
    if summary["accuracy_teacher"] is not None:
        axis.axhline(summary["accuracy_teacher"], color="#c05621", linestyle="--", linewidth=1, label="the teacher's")
    axis.set(xlim=(0, summary["steps"]), ylim=(0, 1.05), xlabel="step")
    axis.set_title("right answers, by step", loc="left", color=INK)
    axis.legend(fontsize=8, loc="lower right", framealpha=1)


def draw_rollout(axis: Axes, texts: list[tuple[str, str]], inches: float) -> None:
    """Tokens as they follow each other, each on the colour of its zone; `inches` wide."""
    font = {"family": "DejaVu Sans Mono", "fontsize": 72 * inches / COLUMNS / MONOSPACE, "parse_math": False}
    for line, column, text, zone in placed(texts):
        colour = COLOURS.get(zone, "white")
        axis.add_patch(Rectangle((column, line), len(text), 0.86, facecolor=colour, edgecolor="white", linewidth=1))
        axis.text(column, line + 0.43, text, color=INK if zone else "#777777", verticalalignment="center", **font)


def placed(texts: list[tuple[str, str]]) -> list[tuple[int, int, str, str]]:
    """(line, column, text, zone) of what fits into the box; a text goes on in the next line where one ends."""
    line = column = 0
    found = []
    for text, zone in texts:
        for number, part in enumerate(text.split("\n")):
            if number:
                line, column = line + 1, 0
            if column and column + len(part) > COLUMNS:
                line, column = line + 1, 0
            for start in range(0, len(part), COLUMNS):
                piece = part[start : start + COLUMNS]
                if start:
                    line, column = line + 1, 0
                found.append((line, column, piece, zone))
                column += len(piece)
        if not zone and column:  # the response begins a line
            line, column = line + 1, 0
    return [place for place in found if place[0] < LINES - len(MEANINGS)]


if __name__ == "__main__":
    app()
