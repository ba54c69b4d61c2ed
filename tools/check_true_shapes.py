"""Is our model transformers' at the true widths? ``python tools/check_true_shapes.py --shape 7b --dtype fp32 --tp 2``.

Two layers with random bf16 weights, one sliding and one full, the true vocabulary: logits and every gradient beside
transformers' in fp32 over the same weights. In bf16, transformers' own distance from fp32 is the measure of ours.
Takes minutes, and memory for the weights in fp32 (7b: 10 GB, 32b: 16 GB).
"""

from __future__ import annotations

import json
import sys
from datetime import date
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from true_shapes.launch import check
from true_shapes.model import SHAPES

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import UserError

RESULTS = Path(__file__).parents[1] / "benchmarks" / "true_shapes"
FAILED = 1  # exit code


class Width(StrEnum):
    b7 = "7b"
    b32 = "32b"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


app = App(help=__doc__)


@app.command()
def main(
    shape: Annotated[Width, typer.Option(help="whose widths")],
    dtype: Annotated[Precision, typer.Option(help="of arithmetic and weights")] = Precision.fp32,
    tp: Annotated[int, typer.Option(min=1, help="tensor-parallel ranks, processes on this machine")] = 1,
    workdir: Annotated[Path, typer.Option(help="for weights and gradients: 7b 8 GB, 32b 13 GB")] = Path(),
    write: Annotated[bool, typer.Option(help="into benchmarks/true_shapes.json and .md")] = False,
) -> None:
    with one_line_errors():
        if not workdir.is_dir():
            raise UserError(f"--workdir {workdir}: no such directory")
        if SHAPES[shape.value].kv_heads % tp:
            raise UserError(
                f"--tp {tp}: must divide the {SHAPES[shape.value].kv_heads} key/value heads of {shape.value}"
            )
        result = check(SHAPES[shape.value], dtype.value, tp, workdir)
        result |= {"date": date.today().isoformat()}
        result["versions"] = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
        print(json.dumps(result, indent=2))
        if write:
            write_results(f"{shape.value} {dtype.value} tp{tp}", result)
        sys.exit(0 if result["passed"] else FAILED)


def write_results(name: str, result: dict[str, Any], stem: Path = RESULTS) -> None:
    """Put one measurement among the others, in both files."""
    path = stem.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {}
    results = dict(sorted((results | {name: result}).items()))
    path.write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    head = ["shape", "logits", "loss", "worst gradient", "transformers' logits", "its worst gradient", "memory, GB"]
    head += ["seconds", "verdict"]
    lines = ["# Parity at the true widths", ""]
    lines += ["Distances from transformers in fp32 over the same bf16 weights: norm of the difference over the norm."]
    lines += ["In bf16, transformers' own distance is beside ours. Memory: all processes of our pass.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, result in results.items():
        ours, theirs = result["megatron"], result.get("transformers")
        worst = ours["worst_gradient"]
        cells = [name, f"{ours['logits']['l2']:.1e}", f"{ours['loss']:.1e}", f"{worst['l2']:.1e} ({worst['name']})"]
        cells += [f"{theirs['logits']['l2']:.1e}", f"{theirs['worst_gradient']['l2']:.1e}"] if theirs else ["", ""]
        cells += [f"{result['peak_gb']['megatron']:.1f}", f"{result['seconds']['megatron']:.0f}"]
        lines.append("| " + " | ".join([*cells, "same" if result["passed"] else "NOT THE SAME"]) + " |")
    return "\n".join([*lines, "", "`python tools/check_true_shapes.py --shape SHAPE --dtype DTYPE --tp N --write`", ""])


if __name__ == "__main__":
    app()
