"""Accuracies and errors against numbers worked out by hand or by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sead.evaluation.statistics import (
    difference_of_groups,
    mean_of_summaries,
    paired_bootstrap,
    summarize,
)
from megatron_sead.evaluation.tally import Graded


def answers(*prompts: str) -> list[list[Graded]]:
    """A word a prompt: r right, w wrong, x cut and wrong, y cut and right; the n-th of all answers has n tokens."""
    found: list[list[Graded]] = []
    for number, word in enumerate(prompts):
        of_prompt = [
            Graded(str(number), sample, 1 + sample + number * len(word), mark in "rw", mark in "ry")
            for sample, mark in enumerate(word)
        ]
        found.append(of_prompt)
    return found


def test_a_summary_counts_prompts_as_units() -> None:
    summary = summarize(answers("rr", "rw", "wx", "yx"))
    rates = [1, 0.5, 0, 0.5]
    assert (summary.prompts, summary.samples, summary.accuracy) == (4, 2, 0.5)
    assert summary.standard_error == pytest.approx(math.sqrt(sum((rate - 0.5) ** 2 for rate in rates) / 3 / 4))
    assert summary.accuracy_if_finished == pytest.approx(3 / 5)
    assert summary.truncated == pytest.approx(3 / 8)
    assert summary.mean_tokens == 4.5


def test_of_answers_that_were_all_cut_nothing_is_said() -> None:
    summary = summarize(answers("x"))
    assert (summary.accuracy, summary.standard_error, summary.accuracy_if_finished) == (0, 0, None)
    assert summary.truncated == 1


def test_the_average_counts_benchmarks_alike() -> None:
    summaries = [summarize(answers("r", "w")), summarize(answers("r", "r", "r", "w"))]
    mean, error = mean_of_summaries(summaries)
    assert mean == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert error == pytest.approx(math.hypot(*(summary.standard_error for summary in summaries)) / 2)


def test_pairs_say_more_than_two_accuracies() -> None:
    """Two models that differ on few prompts: the interval is as the normal one of the differences, and far narrower
    than that of two independent accuracies."""
    generator = np.random.default_rng(3)
    before = (generator.random(400) < 0.5).astype(float)
    after = np.where(generator.random(400) < 0.1, 1.0, before)
    found = paired_bootstrap(after.tolist(), before.tolist())
    differences = after - before
    half = 1.96 * differences.std(ddof=1) / 20
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - half, abs=0.004)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.004)
    assert found.low > 0
    assert paired_bootstrap(after.tolist(), before.tolist()) == found  # the same table whenever it is made
    mirrored = paired_bootstrap(before.tolist(), after.tolist())
    assert (mirrored.mean, mirrored.low, mirrored.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(5), 0
    for seed in range(200):
        rates = generator.binomial(32, [[0.4], [0.3]], (2, 60)) / 32
        found = paired_bootstrap(rates[0].tolist(), rates[1].tolist(), seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.89 < covered / 200 < 0.985


def test_the_same_answers_do_not_differ() -> None:
    found = paired_bootstrap([1.0, 0.0, 0.5], [1.0, 0.0, 0.5])
    # Three prompts that do not differ say little of a fourth: Wilson's interval of 0 of 3 ends at .56
    assert found.mean == 0 and -found.low == found.high == pytest.approx(0.5615, abs=1e-4)
    assert paired_bootstrap([1.0] * 400, [1.0] * 400).high == pytest.approx(0.0095, abs=1e-4)


def test_a_group_of_one_run_is_compared_as_a_pair() -> None:
    generator = np.random.default_rng(3)
    ours, theirs = generator.random((1, 200)), generator.random((1, 200))
    found, pair = difference_of_groups(ours, theirs), paired_bootstrap(list(ours[0]), list(theirs[0]))
    assert found.mean == pytest.approx(pair.mean)
    assert (found.low, found.high) == pytest.approx((pair.low, pair.high), abs=0.004)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_seeds_that_differ_widen_the_interval_by_their_standard_error(seeds: int) -> None:
    """Every prompt alike: only seeds vary, which a plain bootstrap of few understates."""
    generator = np.random.default_rng(4)
    of_seed = generator.normal(0.5, 0.1, seeds)
    found = difference_of_groups(np.repeat(of_seed[:, None], 50, axis=1))
    spread = np.std(of_seed, ddof=1) / math.sqrt(seeds)
    assert found.mean == pytest.approx(of_seed.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.3)


def test_drawing_prompts_and_seeds_covers_the_true_difference() -> None:
    generator = np.random.default_rng(5)
    inside = 0
    for number in range(40):
        prompts = generator.random(60)
        groups = [
            np.clip(prompts + generator.normal(0, 0.03, (4, 1)) + generator.normal(0, 0.1, (4, 60)), -1, 2)
            for _ in range(2)
        ]
        found = difference_of_groups(*groups, seed=number)
        inside += found.low <= 0 <= found.high
    assert 31 <= inside <= 40
