"""Accuracy on held-out prompts: greedy and sampled side by side, since losses that cover modes look bad greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import ProcessGroup

from megatron_sead.evaluation.asking import ask
from megatron_sead.evaluation.statistics import mean_and_error
from megatron_sead.grading.grader import Grader
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.rollouts.engine import Rollout, RolloutEngine, Sampling

EVALUATION_STEP = -1  # no training step: evaluations before and after a run draw the same numbers, and no other does


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers. Prompts are the units: a prompt's samples are not independent of each other."""

    mean: float
    standard_error: float  # over prompts; 0 with a single prompt
    truncated: float  # share of responses cut at max_new_tokens
    prompts: int


@dataclass(frozen=True)
class EvaluationResult:
    """Of all prompts and of each level, the levels in order. `sampled` is None where no samples were asked for."""

    greedy: Accuracy
    sampled: Accuracy | None
    greedy_by_level: dict[str, Accuracy]
    sampled_by_level: dict[str, Accuracy]
    # A share of right answers each, in the order of the prompts: two models are compared prompt by prompt
    greedy_by_prompt: list[float]
    sampled_by_prompt: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(
    engine: RolloutEngine,
    tokenizer: ModelTokenizer,
    prompts: Sequence[Prompt],
    grader: Grader,
    *,
    max_new_tokens: int,
    samples: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    group: ProcessGroup | None = None,
) -> EvaluationResult:
    """Ask a model every prompt once greedily and ``samples`` times at a temperature. Collective over the group.

    Args:
        engine: with the weights that are judged.
        tokenizer: the judged model's; its role says whether it sees the student's or the teacher's prompt.
        group: gloo group whose ranks share the grading; the engine has its own.
    """
    if not prompts:
        raise ValueError("no prompts to evaluate on")
    rollouts = ask(engine, tokenizer, [(p, 0) for p in prompts], EVALUATION_STEP, Sampling(0.0, 1.0, max_new_tokens))
    if samples:
        asked = [(prompt, sample) for sample in range(samples) for prompt in prompts]
        rollouts += ask(engine, tokenizer, asked, EVALUATION_STEP, Sampling(temperature, top_p, max_new_tokens))
    copies = list(prompts) * (1 + samples)
    responses = [tokenizer.decode(rollout.response_token_ids) for rollout in rollouts]
    correct = grader.grade_all(responses, [prompt.answers for prompt in copies], group)

    count = len(prompts)
    greedy_by_prompt = _by_prompt(rollouts[:count], correct[:count], count)
    sampled_by_prompt = _by_prompt(rollouts[count:], correct[count:], count)
    return EvaluationResult(
        greedy=_accuracy(greedy_by_prompt),
        sampled=_accuracy(sampled_by_prompt) if samples else None,
        greedy_by_level=_by_level(prompts, greedy_by_prompt),
        sampled_by_level=_by_level(prompts, sampled_by_prompt) if samples else {},
        greedy_by_prompt=[right for right, _ in greedy_by_prompt],
        sampled_by_prompt=[right for right, _ in sampled_by_prompt] if samples else [],
    )


# A prompt's outcome: its share of right answers, and its share of truncated responses.
Outcome = tuple[float, float]


def _by_prompt(rollouts: list[Rollout], correct: list[bool], count: int) -> list[Outcome]:
    outcomes = []
    for i in range(count):
        right, finished = correct[i::count], [rollout.finished for rollout in rollouts[i::count]]
        samples = max(1, len(right))
        outcomes.append((sum(right) / samples, 1 - sum(finished) / samples))
    return outcomes


def _accuracy(outcomes: list[Outcome]) -> Accuracy:
    mean, error = mean_and_error([right for right, _ in outcomes])
    count = len(outcomes)
    return Accuracy(mean, error, sum(truncated for _, truncated in outcomes) / count, count)


def _by_level(prompts: Sequence[Prompt], outcomes: list[Outcome]) -> dict[str, Accuracy]:
    levels: dict[str, list[Outcome]] = {}
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        if prompt.level is not None:
            levels.setdefault(prompt.level, []).append(outcome)
    return {level: _accuracy(levels[level]) for level in sorted(levels, key=numbers_first)}


def numbers_first(level: str) -> tuple[bool, float, str]:
    """In what order levels are shown: 2 before 10, and names behind numbers."""
    try:
        return (False, float(level), level)
    except ValueError:
        return (True, 0.0, level)
