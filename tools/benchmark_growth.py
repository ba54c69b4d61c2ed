"""What of a step grows with ranks, tokens and prompts, beside the model's own work:
``python tools/benchmark_growth.py [--write FILE]``.

One process stands for one rank of many data-parallel ones: it does, with the product's own functions, what such a rank
does in a step outside of the models, on the rollouts of all. Each number is processor time, the least of several times.
Shares of the step's tokens are as large for every number of ranks (weak scaling); then 1.5 million tokens are shared by
ever more ranks (strong scaling); then the prompt set grows.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.config.run import ModelSettings
from megatron_sead.distillation import Curriculum, zones
from megatron_sead.distillation.selection import DIGIT, KEY_BITS
from megatron_sead.files.outputs import require_free
from megatron_sead.prompts.packing import pack
from megatron_sead.prompts.tokenizer import load_tokenizer
from megatron_sead.reporting.machine import machine
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.rollouts.records import write_records
from megatron_sead.scaling.rollouts import drawing

PAIR = Path(__file__).parents[1] / "examples" / "tiny"
ALL = 1_500_000  # response tokens of a step, in strong scaling
A_RANK = ALL // 64  # and of each share, in weak scaling
LENGTHS = "2000,16384"
MOST, PROMPT = 16384, 128
RANKS = (1, 4, 16, 64)
HISTOGRAMS = -(-32 // DIGIT) + -(-KEY_BITS // DIGIT)  # of a selection by fp32 values
PROMPT_SETS = (1_000, 10_000, 100_000, 1_000_000)
PARTS = {  # what a rank does, and on how much of the step
    "rollouts of all ranks": "all; pickled, as they travel",
    "text of responses": "its share",
    "packing": "all lengths; tokens of its share",
    "zones": "its share; histograms of all",
    "record": "all; the first rank alone",
}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="times that each part is timed; the least counts")] = 3,
    write: Annotated[Path | None, typer.Option(help="new files: WRITE.json and WRITE.md")] = None,
) -> None:
    """Measure, print, and write."""
    with one_line_errors():
        for name in () if write is None else (write.with_suffix(".md"), write.with_suffix(".json")):
            require_free(name)
        torch.set_num_threads(1)
        weak = [measure(ranks, A_RANK * ranks, repeats) for ranks in RANKS]
        strong = [measure(ranks, ALL, repeats) for ranks in RANKS[:-1]] + weak[-1:]
        curriculum = [curriculum_seconds(count, repeats) for count in PROMPT_SETS]
    result = {"weak": weak, "strong": strong, "curriculum": curriculum, "machine": machine()}
    result |= {"versions": {"torch": version("torch")}, "date": date.today().isoformat()}
    result["command"] = " ".join(["python tools/benchmark_growth.py", *sys.argv[1:]])
    text = markdown(result)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if write is not None:
        write.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write.with_suffix(".md").write_text(text, encoding="utf-8")


def measure(ranks: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Processor seconds by part of the first of so many data-parallel ranks."""
    rollouts = made_rollouts(tokens, ranks)
    total = sum(len(rollout.response_token_ids) for rollout in rollouts)
    tokenizer = load_tokenizer(ModelSettings(path=PAIR / "student"), "student")
    shares = [pickle.dumps(dict(enumerate(rollouts[rank::ranks]))) for rank in range(ranks)]
    own = rollouts[::ranks]
    own_tokens = entropies(total // ranks)
    print(f"{ranks} ranks, {total:,} tokens", file=sys.stderr, flush=True)
    seconds = {
        "rollouts of all ranks": least(lambda: pickle.dumps(dict(enumerate(rollouts))), repeats),
        "text of responses": least(lambda: [tokenizer.decode(r.response_token_ids) for r in own], repeats),
        "packing": least(lambda: packed(rollouts, ranks), repeats),
        "zones": least(lambda: zones_of(own_tokens), repeats),
    }
    with tempfile.TemporaryDirectory() as folder:
        extras = [{"response": "", "correct": True, "zones": "A" * len(r.response_token_ids)} for r in rollouts]
        seconds["record"] = least(lambda: write_records(Path(folder, "step-0.jsonl"), rollouts, extras), 1)
    return {
        "ranks": ranks,
        "tokens": total,
        "rollouts": len(rollouts),
        "seconds": seconds,
        "pickled_bytes": sum(map(len, shares)),
        "zones_bytes": 2 * HISTOGRAMS * 8 * 2**DIGIT,  # of C, then of B
    }


def least(call: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of a call."""
    found = []
    for _ in range(repeats):
        before = time.process_time()
        call()
        found.append(time.process_time() - before)
    return min(found)


def made_rollouts(tokens: int, ranks: int) -> list[Rollout]:
    """Of at least so many response tokens, a multiple of the ranks in number."""
    chance, draw = random.Random(0), drawing(LENGTHS, MOST)
    made: list[Rollout] = []
    left = tokens
    while left > 0 or len(made) % ranks:
        length = min(MOST, draw(chance))
        left -= length
        answer, prompt = tuple(chance.choices(range(4, 300), k=length)), tuple(chance.choices(range(4, 300), k=PROMPT))
        made.append(Rollout(str(len(made)), 0, prompt, answer, True, (-1.0,) * length))
    return made


def packed(rollouts: list[Rollout], ranks: int) -> None:
    """As a run packs its step."""
    prompts = [rollout.prompt_token_ids for rollout in rollouts]
    pack(
        prompts,
        prompts,
        [rollout.response_token_ids for rollout in rollouts],
        [True] * len(rollouts),
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=ranks,
        length_multiple=8,
        pad_token_id=0,
        device=torch.device("cpu"),
        log_probs=[rollout.log_probs for rollout in rollouts],
        micro_batch_tokens=MOST + 2048,
    )


def entropies(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's and the teacher's, and the key of each token."""
    torch.manual_seed(0)
    return torch.rand(tokens) ** 4, torch.rand(tokens) ** 8, torch.randperm(tokens)


def zones_of(own: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """What each rank computes between the all-reduces of its histograms."""
    student, teacher, index = own
    zones.zones_and_thresholds(student, teacher, torch.ones_like(index, dtype=torch.bool), token_index=index)


def curriculum_seconds(count: int, repeats: int) -> dict[str, Any]:
    """Choosing a step's 96 prompts among so many."""
    chance = random.Random(0)
    curriculum = Curriculum([chance.random() for _ in range(count)], batch_size=96, total_steps=100, seed=0)
    return {"prompts": count, "seconds": least(lambda: curriculum.next_batch(7), repeats)}


def markdown(result: dict[str, Any]) -> str:
    """Tables, with what they depend on."""
    m = result["machine"]
    parts = [
        "# What grows with ranks, tokens and prompts",
        f"{result['date']}, {m['cpu']}, one thread, Python {m['python']}, torch {result['versions']['torch']}, load "
        f"{m['load_average_15_minutes']}. Processor seconds of the first of so many data-parallel ranks in a step, "
        "outside of the models; one process does what this rank would.",
        "Each part works on: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()) + ".",
        f"## Weak scaling: {A_RANK:,} response tokens a rank",
        table(result["weak"]),
        f"## Strong scaling: {ALL:,} response tokens in all",
        table(result["strong"]),
        "## Choosing 96 prompts",
        "\n".join(
            ["| prompts | seconds |", "| --- | --- |"]
            + [f"| {line['prompts']:,} | {line['seconds']:.4f} |" for line in result["curriculum"]]
        ),
        f"`{result['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def table(lines: list[dict[str, Any]]) -> str:
    """A line a number of ranks."""
    head = ["ranks", "rollouts", "tokens", *PARTS, "rollouts, MB pickled", "zones, MB all-reduced"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        sizes = [f"{line[name] / 1e6:.1f}" for name in ("pickled_bytes", "zones_bytes")]
        counts = [f"{line[name]:,}" for name in ("ranks", "rollouts", "tokens")]
        rows.append([*counts, *(f"{line['seconds'][part]:.3f}" for part in PARTS), *sizes])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    app = App()
    app.command()(main)
    app()
