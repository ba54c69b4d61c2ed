"""How fast packed rollouts train beside rows of them: ``python tools/benchmark_packed.py [--write FILE]``.

Responses are as long as in training on hard problems, a sixteenth of it: a mean of 2,000 tokens, the 99th percentile
and the most 16,384. A small student trains on the same rollouts in every form, in micro-batches of the same peak: rows
of B rollouts have at most B times the longest tokens, and so many is the budget of the packed form. One process with
one thread, fp32. Every step is trained in each form in turn, since machines are shared; what is timed is `train_step`.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_step import PAIR, ROOT  # beside this file
from rich.console import Console

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.files.outputs import require_free
from megatron_sead.reporting.machine import machine

SCALE = 16
MOST = 16384 // SCALE  # tokens of a response
MU, SIGMA = 6.846, 1.229  # log-normal: a mean of 2,000 and a 99th percentile of 16,384
PROMPT = 128 // SCALE  # tokens of a prompt, about
WARM_UP = 1  # first steps, not counted
COLUMNS = ("rollouts a row", "form", "micro-batches", "most tokens", "response tokens / s", "packed / rows")


@dataclass
class Form:
    """How a step's rollouts are in micro-batches, and what was seen of them."""

    rows: int  # rollouts of a micro-batch of rows; a packed one may have as many of the longest
    packed: bool
    speeds: list[float] = field(default_factory=list)  # response tokens a second, a step each
    counts: list[int] = field(default_factory=list)  # micro-batches
    most: int = 0  # tokens of a micro-batch, padding included

    def take(self, config: RunConfig, longest: int) -> None:
        """Let the run be of this form."""
        config.training.micro_batch_tokens = None  # first: every assignment is checked
        config.training.micro_batch_size = 1 if self.packed else self.rows
        config.training.micro_batch_tokens = self.rows * longest if self.packed else None

    def see(self, tokens: Sequence[int], response_tokens: int, seconds: float) -> None:
        """Note a step: its micro-batches' tokens, and how long it took."""
        self.counts.append(len(tokens))
        self.most = max(self.most, *tokens)
        self.speeds.append(response_tokens / seconds)

    def summary(self) -> dict[str, Any]:
        speeds = self.speeds[WARM_UP:]
        return {
            "rows": self.rows,
            "packed": self.packed,
            "micro_batches_a_step": round(statistics.mean(self.counts), 1),
            "most_tokens": self.most,
            "tokens_a_second": {"median": statistics.median(speeds), "best": max(speeds), "steps": len(speeds)},
        }


def ratio(packed: Form, rows: Form) -> float:
    """How many times as fast, by the median over the steps: both trained a step one after the other."""
    pairs = zip(packed.speeds[WARM_UP:], rows.speeds[WARM_UP:], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def main(
    steps: Annotated[int, typer.Option(min=WARM_UP + 1, help="steps, the first not counted")] = 13,
    rollouts: Annotated[int, typer.Option(min=4, help="rollouts of a step, a multiple of 4")] = 96,
    hidden: Annotated[int, typer.Option(min=64, help="width of the student and of the teacher")] = 64,
    write: Annotated[Path | None, typer.Option(help="new files: WRITE.json and WRITE.md")] = None,
) -> None:
    """Time all forms, print a table, write it with the machine, the versions and the command."""
    with one_line_errors():
        for suffix in (".md", ".json") if write is not None else ():
            require_free(write.with_suffix(suffix))
        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        forms = [Form(rows, packed) for rows in (1, 4) for packed in (False, True)]
        with tempfile.TemporaryDirectory() as folder:
            longest = _record(Path(folder), steps, rollouts, hidden)
            tokens = _train(_config(Path(folder), steps, rollouts), forms, longest)
    result = {
        "forms": [form.summary() for form in forms],
        "ratios": [ratio(*pair) for pair in zip(forms[1::2], forms[::2], strict=True)],
        "settings": {"steps": steps, "rollouts": rollouts, "hidden": hidden, "layers": 4},
        "response_tokens_a_step": tokens // steps,
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")},
        "machine": machine(),
        "date": date.today().isoformat(),
        "command": " ".join(["python tools/benchmark_packed.py", *sys.argv[1:]]),
    }
    text = markdown(result)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if write is not None:
        write.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write.with_suffix(".md").write_text(text, encoding="utf-8")


def _record(folder: Path, steps: int, rollouts: int, hidden: int) -> int:
    """Write models, prompts and rollouts. Returns the most tokens of a rollout."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from megatron_sead.rollouts.engine import Rollout
    from megatron_sead.rollouts.records import record_path, write_records

    draw = random.Random(0)
    for role, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(PAIR / "student", trust_remote_code=False)
        config.update({"hidden_size": hidden, "intermediate_size": 2 * hidden, "max_position_embeddings": 2048})
        config.update({"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64})
        config.update({"sliding_window": 4096 // SCALE})
        config.rope_parameters["full_attention"]["original_max_position_embeddings"] = 2048 // 8  # YaRN's factor
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder / role)
        AutoTokenizer.from_pretrained(PAIR / "student", trust_remote_code=False).save_pretrained(folder / role)
    tokenizer = Tokenizer.from_file(str(PAIR / "student" / "tokenizer.json"))
    prompts = [f"{i} " + "+".join(str(draw.randrange(10)) for _ in range(PROMPT // 2)) for i in range(rollouts)]
    rows = [json.dumps({"id": str(i), "prompt": text, "answer": "1"}) for i, text in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    asked = [tuple(tokenizer.encode(text).ids) for text in prompts]
    for step in range(steps):
        written = [min(MOST, 1 + round(draw.lognormvariate(MU, SIGMA) / SCALE)) for _ in asked]
        written[draw.randrange(rollouts)] = MOST  # as almost every step of training has one
        answers = [tuple(draw.randrange(4, 300) for _ in range(count)) for count in written]
        made = [Rollout(str(i), 0, asked[i], answer, True, None) for i, answer in enumerate(answers)]
        write_records(record_path(folder / "recorded", step), made)
    return max(len(tokens) for tokens in asked) + MOST


def _config(folder: Path, steps: int, rollouts: int) -> RunConfig:
    settings = {
        "output": folder / "run",
        "student.path": folder / "student",
        "teacher.path": folder / "teacher",
        "prompts.path": folder / "prompts.jsonl",
        "prompts.template": "plain",
        "rollouts.engine": "replay",
        "rollouts.path": folder / "recorded",
        "rollouts.max_new_tokens": MOST,
        "parallel.tensor_model_parallel_size": 1,
        "training.steps": steps,
        "training.global_batch_size": rollouts,
        "training.micro_batch_size": 4,
        "curriculum.mode": "none",
        "evaluation.path": "null",
        "reporting.tensorboard": "false",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_config(ROOT / "examples" / "configs" / "sead_tiny.yaml", overrides)


def _train(config: RunConfig, forms: list[Form], longest: int) -> int:
    """Train on every step's rollouts in each form. Returns the response tokens of all steps."""
    from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

    adapt_to_cpu()
    import torch

    from megatron_sead.training.setup import prepare
    from megatron_sead.training.step import train_step

    torch.set_num_threads(1)
    total = 0
    with prepare(config) as run:
        for step in range(config.training.steps):
            rollouts = run.engine.generate([], step)
            written = sum(len(rollout.response_token_ids) for rollout in rollouts)
            total += written
            for form in forms:
                form.take(config, longest)
                micro_batches = run.pack(rollouts)
                started = time.perf_counter()
                train_step(run.learner, micro_batches, alpha=0.5, step=step)
                seconds = time.perf_counter() - started
                form.see([batch.student.tokens.numel() for batch in micro_batches], written, seconds)
            print(f"step {step}: {[round(form.speeds[-1]) for form in forms]} response tokens / s")
    return total


def markdown(result: dict[str, Any]) -> str:
    """A table for reading, with what it depends on."""
    machine, s = result["machine"], result["settings"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS))]
    for rows, packed, times in zip(result["forms"][::2], result["forms"][1::2], result["ratios"], strict=True):
        for form in (rows, packed):
            cells = [
                str(form["rows"]),
                "packed" if form["packed"] else "rows",
                f"{form['micro_batches_a_step']:g}",
                f"{form['most_tokens']:,}",
                f"{form['tokens_a_second']['median']:,.0f}",
                f"{times:.2f}" if form["packed"] else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "# Packed rollouts beside rows",
            "",
            f"{result['date']}, {machine['cpu']}, {machine['cores']} cores (one process, one thread), Python "
            f"{machine['python']}, load {machine['load_average_15_minutes']}. {s['rollouts']} rollouts a step, "
            f"{result['response_tokens_a_step']:,} tokens in all: log-normal, a sixteenth of a mean of 2,000 and a "
            f"99th percentile of 16,384, which is the most. OLMo-3 of {s['layers']} layers, hidden {s['hidden']}, "
            f"fp32; {s['steps']} steps, each trained in every form in turn. Rows are sorted by length, so that those "
            "of a micro-batch are about as long. Timed are the teacher's pass, the scores and the training pass; the "
            "table has medians over the steps, of the ratio too.",
            "",
            *lines,
            "",
            "- " + ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
            f"- `{result['command']}`",
            "",
        ]
    )


if __name__ == "__main__":
    app = App()
    app.command()(main)
    app()
