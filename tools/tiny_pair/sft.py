"""Supervised training on worked solutions: how the teacher gets good, and where the student is stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_pair.answers import accuracy, prompt_token_ids
from tiny_pair.problems import LEVELS, Problem, draw_problem, draw_problems

CHECK_INTERVAL = 25  # steps between looks at the accuracy that may end the training
CHECK_PROBLEMS = 40  # of each level
IGNORED = -100  # target of prompt and padding positions


@dataclass(frozen=True)
class Recipe:
    """Settings of one supervised training."""

    steps: int
    stop_at_accuracy: float | None = None  # greedy, on problems of its own; None: all steps
    batch_size: int = 64
    lr: float = 4e-3
    warmup_steps: int = 20
    min_lr_share: float = 0.05  # of lr, where the linear decay ends


def supervised_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    reserved: Collection[Problem],
    seed: int,
    report: Callable[[int, float], None],
) -> int:
    """Train ``model`` in place on fresh problems outside ``reserved``; returns the steps taken.

    Every batch is drawn anew, levels uniformly. ``report(step, loss)`` is called after each step. A model that
    stops at an accuracy keeps its learning rate: where it will stop is not known beforehand.
    """
    rng = random.Random(f"supervised training {seed}")
    checks = [p for level in LEVELS for p in draw_problems(rng, level, CHECK_PROBLEMS, exclude=reserved)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, recipe.steps + 1):
        model.train()
        tokens, targets = _batch(rng, tokenizer, recipe.batch_size, reserved)
        logits = model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _lr_share(step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss.item())
        if recipe.stop_at_accuracy is None or step % CHECK_INTERVAL:
            continue
        if accuracy(model, tokenizer, checks, greedy=True) >= recipe.stop_at_accuracy:
            return step
    return recipe.steps


def _lr_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay if the last step is known."""
    warmup = min(1.0, step / recipe.warmup_steps)
    if recipe.stop_at_accuracy is not None:
        return warmup
    return warmup * (1 - (1 - recipe.min_lr_share) * step / recipe.steps)


def _batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, size: int, reserved: Collection[Problem]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both [size, longest], right-padded; only the solution and its end are targets."""
    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < size:
        problem = draw_problem(rng, rng.choice(LEVELS))
        if problem in reserved:
            continue
        solution = tokenizer.encode(problem.solution(rng), add_special_tokens=False)
        rows.append((prompt_token_ids(problem, tokenizer), [*solution, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(solution) for prompt, solution in rows)
    tokens = torch.full((size, width), tokenizer.pad_token_id)
    targets = torch.full((size, width), IGNORED)
    for row, (prompt, solution) in enumerate(rows):
        tokens[row, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
        targets[row, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
    return tokens, targets
