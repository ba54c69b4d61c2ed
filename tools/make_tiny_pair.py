"""Make a small OLMo-3 teacher that is good at generated math problems, a student that is not, and prompt files."""

from __future__ import annotations

import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_pair.answers import accuracy, pass_rates
from tiny_pair.models import Shape, build_model, save_model
from tiny_pair.problems import LEVELS, Problem, ProblemSets, make_problem_sets
from tiny_pair.sft import Recipe, supervised_training
from tiny_pair.tokenizer import load_tokenizer, train_tokenizer
from transformers import Olmo3ForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import whole_directory

console = Console(stderr=True)
app = App()
STUDENT_MAX_STEPS = 2000
TEACHER_LR = 3e-3  # at 4e-3 its greedy answers are as good, its sampled ones worse (.94 for .98)


@app.command(help=__doc__)
def main(
    output: Annotated[Path, typer.Option(help="directory for teacher/, student/, the prompt files and recipe.json")],
    seed: Annotated[int, typer.Option(min=0, help="of problems, weights and training")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer directory or tokenizers JSON file, with --random; default: own")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random", help="leave the weights random and write the two models only")
    ] = False,
    teacher_size: Annotated[str, typer.Option(help="HIDDEN,KV_HEADS,FFN; heads have 32 dimensions")] = "128,2,256",
    student_size: Annotated[str, typer.Option(help="HIDDEN,KV_HEADS,FFN")] = "64,2,128",
    layers: Annotated[int, typer.Option(help="of both models")] = 4,
    context: Annotated[int, typer.Option(help="positions of both models; YaRN stretches an eighth of them")] = 256,
    teacher_steps: Annotated[int, typer.Option(min=1, help="supervised steps of the teacher")] = 1200,
    student_accuracy: Annotated[
        float, typer.Option(min=0, max=1, help="greedy accuracy at which the student's training stops")
    ] = 0.42,
    prompts: Annotated[int, typer.Option(min=5, help="problems to distil on")] = 1000,
    heldout: Annotated[int, typer.Option(min=1, help="held-out problems of each level")] = 50,
    samples: Annotated[int, typer.Option(min=1, help="rollouts of the student behind each difficulty")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUTPUT, if all in it is ours")] = False,
) -> None:
    with one_line_errors():
        shapes = {"teacher": _shape(teacher_size, layers, context), "student": _shape(student_size, layers, context)}
        if tokenizer is not None and not random_weights:
            raise UserError(f"--tokenizer {tokenizer}: only with --random; training needs the tool's own tokenizer")
        read = () if tokenizer is None else (tokenizer,)
        with whole_directory(output, inputs=read, overwrite=overwrite) as directory:
            sets = _sets(seed, prompts, heldout)
            tokens = _tokenizer(tokenizer, seed)
            models = {name: build_model(shape, tokens, seed + i) for i, (name, shape) in enumerate(shapes.items())}
            recipe: dict[str, Any] = {"seed": seed, "shapes": {name: asdict(shape) for name, shape in shapes.items()}}
            if not random_weights:
                recipe |= _train(models, tokens, sets, seed, teacher_steps, student_accuracy)
                recipe |= _write_prompts(models["student"], tokens, sets, seed, samples, directory)
            for name, model in models.items():
                save_model(model, tokens, directory / name)
            _write_recipe(recipe, directory)
    console.print(f"wrote {output}")


def _shape(size: str, layers: int, context: int) -> Shape:
    try:
        hidden, key_value_heads, ffn = map(int, size.split(","))
    except ValueError:
        raise UserError(f"size {size!r}: must be three integers HIDDEN,KV_HEADS,FFN, as in 64,2,128") from None
    shape = Shape(hidden, key_value_heads, ffn, layers, context)
    if problem := shape.problem():
        raise UserError(f"size {size!r}: {problem}")
    return shape


def _sets(seed: int, prompts: int, heldout: int) -> ProblemSets:
    try:
        return make_problem_sets(seed, prompts, heldout)
    except ValueError as error:
        raise UserError(f"--prompts {prompts} --heldout {heldout}: {error}") from error


def _tokenizer(path: Path | None, seed: int) -> PreTrainedTokenizerBase:
    """The given tokenizer, or one trained on problems and solutions of every level."""
    if path is not None:
        try:
            return load_tokenizer(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer: {' '.join(str(error).split())}") from error
    rng = random.Random(f"tokenizer {seed}")
    corpus = make_problem_sets(seed, 100, 10).pool
    turns = ["system\n", "user\n", "assistant\n"] * 2
    return train_tokenizer([*turns, *(text for p in corpus for text in (p.prompt, p.solution(rng)))])


def _train(
    models: dict[str, Olmo3ForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    sets: ProblemSets,
    seed: int,
    teacher_steps: int,
    student_accuracy: float,
) -> dict[str, Any]:
    """Train both models; returns how, and what they can do on the held-out problems."""
    recipes = {"teacher": Recipe(teacher_steps, lr=TEACHER_LR), "student": Recipe(STUDENT_MAX_STEPS, student_accuracy)}
    record: dict[str, Any] = {"supervised": {}, "heldout_accuracy": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name, recipe in recipes.items():
            task = progress.add_task(name, total=recipe.steps, loss="")

            def report(step: int, loss: float, task: Any = task) -> None:
                progress.update(task, completed=step, loss=f"step {step}, loss {loss:.3f}")

            taken = supervised_training(
                models[name], tokenizer, recipe, reserved=sets.reserved, seed=seed, report=report
            )
            progress.update(task, total=taken)
            record["supervised"][name] = asdict(recipe) | {"steps_taken": taken}
            record["heldout_accuracy"][name] = _measure(models[name], tokenizer, sets.heldout, seed)
    for name, measured in record["heldout_accuracy"].items():
        console.print(f"{name}: greedy {measured['greedy']:.3f}, sampled {measured['sampled']:.3f}")
    return record


def _measure(
    model: Olmo3ForCausalLM, tokenizer: PreTrainedTokenizerBase, heldout: Sequence[Problem], seed: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    by_level = {level: [p for p in heldout if p.level == level] for level in LEVELS}
    return {
        "greedy": accuracy(model, tokenizer, heldout, greedy=True),
        "sampled": accuracy(model, tokenizer, list(heldout) * 4, greedy=False),
        "greedy_by_level": {level: accuracy(model, tokenizer, ps, greedy=True) for level, ps in by_level.items()},
    }


def _write_prompts(
    student: Olmo3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sets: ProblemSets,
    seed: int,
    samples: int,
    directory: Path,
) -> dict[str, Any]:
    """Both prompt files, each row with its difficulty for the student; returns a summary for the recipe."""
    torch.manual_seed(seed)
    difficulties: list[float] = []
    for name, problems in (("prompts", sets.pool), ("heldout", sets.heldout)):
        rates = pass_rates(student, tokenizer, problems, samples)
        rows = [_row(f"{name}-{i:04}", p, 1 - rate) for i, (p, rate) in enumerate(zip(problems, rates, strict=True))]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        difficulties += [row["difficulty"] for row in rows] if name == "prompts" else []
    shares = {f"{i / samples:g}": difficulties.count(i / samples) / len(difficulties) for i in range(samples + 1)}
    return {
        "difficulty": {"samples": samples, "temperature": 1.0, "seed": seed, "share_of_prompts": shares},
        "problems": {
            "prompts": len(sets.pool),
            "heldout": len(sets.heldout),
            "in_both": len(set(sets.pool) & set(sets.heldout)),
        },
    }


def _row(identity: str, problem: Problem, difficulty: float) -> dict[str, Any]:
    return {
        "id": identity,
        "prompt": problem.prompt,
        "answer": str(problem.answer),
        "level": str(problem.level),
        "difficulty": difficulty,
    }


def _write_recipe(recipe: dict[str, Any], directory: Path) -> None:
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    recipe["versions"] = {"python": platform.python_version(), **packages}
    (directory / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that sums have one order, and a seed one result, whatever the machine
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    sys.exit(app())
