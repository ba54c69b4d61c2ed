"""Synthetic rollouts in the format that replay reads: the same tokens whatever the layout."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.planning.lengths import read_lengths
from megatron_sead.prompts.dataset import Prompt, stream_prompts
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.rollouts.records import read_records, record_path, write_records

Draw = Callable[[random.Random], int]  # tokens of a response
STRIDE = 7919  # prompts, from those of one step to those of the next


def write_rollouts(folder: Path, config: RunConfig, steps: int, draw: Draw, seed: int) -> None:
    """Rollouts of `steps` steps of a run, under ``rollouts/`` of a folder. Files that are there already stay.

    A rollout is a function of (seed, step, place in the batch) alone: a larger batch begins with a smaller one.
    Responses are random tokens, and the student's stop token at the end of those that max_new_tokens does not cut.

    Raises:
        UserError: the prompts cannot be read, or there are fewer than a step's.
    """
    if all(record_path(folder, step).is_file() for step in range(steps)):
        return
    student, teacher = load_tokenizer(config.student, "student"), load_tokenizer(config.teacher, "teacher")
    prompts = list(
        stream_prompts(
            config.prompts,
            student,
            teacher,
            teacher_prompt_field=config.teacher.prompt_field,
            max_new_tokens=config.rollouts.max_new_tokens,
        )
    )
    batch = config.training.global_batch_size
    if batch > len(prompts):
        raise UserError(
            f"training.global_batch_size={batch}: prompts.path={config.prompts.path} has {len(prompts)} prompts, and a "
            "step asks each at most once"
        )
    plain, stop, most = plain_tokens(student), student.stop_token_ids[0], config.rollouts.max_new_tokens
    for step in range(steps):
        made = []
        for number in range(batch):
            chance = random.Random(f"{seed} {step} {number}")
            prompt = prompts[(STRIDE * step + number) % len(prompts)]
            made.append(_rollout(prompt, draw(chance), most, plain, stop, chance))
        path = record_path(folder, step)
        if not path.is_file():
            write_records(path, made)


def _rollout(prompt: Prompt, wanted: int, most: int, plain: list[int], stop: int, chance: random.Random) -> Rollout:
    finished = wanted <= most
    tokens = chance.choices(plain, k=wanted - 1 if finished else most) + ([stop] if finished else [])
    return Rollout(prompt.id, 0, prompt.student_token_ids, tuple(tokens), finished, None)


def drawing(told: str, longest: int, mean: float | None = None) -> Draw:
    """How to draw a length.

    Args:
        told: MEAN,P99 of a log-normal distribution, a run's directory, or a file with a number of tokens a line.
        longest: what would be longer is one token longer, so that the limit cuts it.
        mean: instead of what is told; the lengths change in proportion.

    Raises:
        UserError: none of these.
    """
    lengths = read_lengths(told, 2**31, None)
    scale = 1.0 if mean is None else mean / lengths.mean
    return lambda chance: max(1, min(longest + 1, round(scale * chance.choice(lengths.values))))


def plain_tokens(tokenizer: ModelTokenizer) -> list[int]:
    """Tokens of text: none that begins or ends a turn."""
    special = {*tokenizer.stop_token_ids, tokenizer.pad_token_id}
    return [token for token in range(tokenizer.vocab_size) if token not in special]


def tokens_of(folder: Path, step: int) -> tuple[int, int, int]:
    """Rollouts, response tokens and all tokens of a recorded step.

    Raises:
        UserError: the record is missing or damaged.
    """
    rollouts = read_records((folder / "rollouts" if (folder / "rollouts").is_dir() else folder) / f"step-{step}.jsonl")
    responses = sum(len(r.response_token_ids) for r in rollouts)
    return len(rollouts), responses, responses + sum(len(r.prompt_token_ids) for r in rollouts)
