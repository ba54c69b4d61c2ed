"""Accuracies with their errors. Prompts are the units: a prompt's samples are not independent of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sead.evaluation.tally import Graded

RESAMPLES = 10_000  # of the bootstrap: the ends of an interval are exact to about a hundredth of its width
Z = 1.96  # of a 95 % interval
ALIKE = 1e-9  # resampled means that differ by less differ by rounding
MOST_AT_ONCE = 2**22  # resampled prompts in memory together


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Of one value a prompt: the mean, and its standard error over prompts, which is 0 with a single prompt."""
    count = len(values)
    mean = sum(values) / count
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0


@dataclass(frozen=True)
class Summary:
    """What a model's answers to a benchmark come to."""

    prompts: int
    samples: int  # answers a prompt
    accuracy: float
    standard_error: float
    accuracy_if_finished: float | None  # of the answers that were not cut; None: all were
    truncated: float  # share of answers cut at max_new_tokens
    mean_tokens: float


def summarize(answers: Sequence[Sequence[Graded]]) -> Summary:
    """Of every prompt's answers, each prompt with as many."""
    every = [answer for of_prompt in answers for answer in of_prompt]
    finished = [answer for answer in every if answer.finished]
    accuracy, error = mean_and_error(pass_rates(answers))
    return Summary(
        prompts=len(answers),
        samples=len(answers[0]),
        accuracy=accuracy,
        standard_error=error,
        accuracy_if_finished=sum(answer.correct for answer in finished) / len(finished) if finished else None,
        truncated=(len(every) - len(finished)) / len(every),
        mean_tokens=sum(answer.tokens for answer in every) / len(every),
    )


def mean_of_summaries(summaries: Sequence[Summary]) -> tuple[float, float]:
    """The mean accuracy of benchmarks, each counting alike, and its standard error: they are independent."""
    count = len(summaries)
    error = math.sqrt(sum(summary.standard_error**2 for summary in summaries)) / count
    return sum(summary.accuracy for summary in summaries) / count, error


def pass_rates(answers: Sequence[Sequence[Graded]]) -> list[float]:
    """The share of right answers of each prompt."""
    return [sum(answer.correct for answer in of_prompt) / len(of_prompt) for of_prompt in answers]


@dataclass(frozen=True)
class Difference:
    """How much more often one model is right than another on the same prompts."""

    mean: float
    low: float  # the 95 % interval
    high: float


def difference_of_groups(runs: np.ndarray, others: np.ndarray | None = None, seed: int = 0) -> Difference:
    """The difference of two methods' mean pass rates, each over several runs that differ in their seed.

    Prompts are drawn anew with replacement, the same for both, and so are each method's runs: the interval holds what
    another set of prompts and what other seeds would change. With a single run it knows nothing of seeds. Where all
    prompts are alike the interval is as wide as Wilson's of a share of 0 or 1.

    Args:
        runs: [seeds, prompts] shares of right answers.
        others: [seeds, prompts] of the method that is compared with; None: nothing is, and the mean is its own.
    """
    generator, count = np.random.default_rng(seed), runs.shape[1]
    at_once, means = max(1, MOST_AT_ONCE // count), list[np.ndarray]()
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        prompts = generator.multinomial(count, np.full(count, 1 / count), size=size) / count
        drawn = _drawn_runs(runs @ prompts.T, generator)
        means.append(drawn if others is None else drawn - _drawn_runs(others @ prompts.T, generator))
    mean = float(runs.mean() - (0.0 if others is None else others.mean()))
    return _resampled(mean, np.concatenate(means), count, least=0.0 if others is None else -1.0)


def _resampled(mean: float, means: np.ndarray, count: int, least: float) -> Difference:
    """By the means of resampled prompts.

    Args:
        count: prompts.
        least: that a prompt's value can be; the most is 1.
    """
    low, high = np.quantile(means, [0.025, 0.975])
    if high - low < ALIKE:  # no prompt differs from another, which resampling takes for certainty
        unseen = Z**2 / (count + Z**2)  # share of prompts that may be otherwise: Wilson's, of a share of 0
        low, high = mean + unseen * (least - mean), mean + unseen * (1 - mean)
    return Difference(mean, float(low), float(high))


def _drawn_runs(means: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[b] the mean over runs drawn anew, of means [seeds, b]."""
    seeds, size = means.shape
    weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
    centre = means.mean(axis=0)
    wider = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0  # drawn from few, they vary too little
    return np.asarray(centre + wider * ((means * weights.T).sum(axis=0) - centre))


def paired_bootstrap(rates: Sequence[float], others: Sequence[float], seed: int = 0) -> Difference:
    """The difference of two models' pass rates on the same prompts, which are drawn anew with replacement.

    Args:
        others: of the model that is compared with, in the same order of prompts.
    """
    differences = np.array(rates) - np.array(others)
    generator = np.random.default_rng(seed)
    count, at_once = len(differences), max(1, MOST_AT_ONCE // len(differences))
    means = [
        differences[generator.integers(count, size=(min(at_once, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    return _resampled(float(differences.mean()), np.concatenate(means), count, least=-1.0)
