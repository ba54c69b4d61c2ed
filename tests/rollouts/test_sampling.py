"""Tokens are drawn from the right distribution, and every rollout has its own stream of numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sead.rollouts.engine import GenerationRequest, Sampling
from megatron_sead.rollouts.sampling import choose_tokens, uniforms

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0])
DRAWS = 50_000


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The definition, one token at a time."""
    kept, total = np.zeros_like(probabilities), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if total >= top_p:
            break
        kept[token] = probabilities[token]
        total += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.1])
def test_distribution(temperature: float, top_p: float) -> None:
    uniform = torch.from_numpy(uniforms(0, 0, GenerationRequest("p", 0, (4,)), DRAWS))
    chosen = choose_tokens(LOGITS.expand(DRAWS, -1), uniform, Sampling(temperature, top_p, 1))
    counts = np.bincount(chosen.numpy(), minlength=len(LOGITS))
    expected = DRAWS * nucleus(torch.softmax(LOGITS.double() / temperature, -1).numpy(), top_p)
    assert not counts[expected == 0].any()
    inside = expected > 0
    chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    assert chi_square < 25  # 5 degrees of freedom: 20.5 is exceeded once in a thousand


def test_zero_temperature_is_the_argmax() -> None:
    assert choose_tokens(LOGITS[None], torch.tensor([0.99]), Sampling(0.0, 1.0, 1)).item() == 0


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_ends_of_the_unit_interval_choose_tokens_that_can_be(uniform: float) -> None:
    logits = torch.full((1, 6), -float("inf"))
    logits[0, 2:4] = 0.0
    expected = 2 if uniform == 0.0 else 3
    drawn = choose_tokens(logits, torch.tensor([uniform], dtype=torch.float64), Sampling(1.0, 1.0, 1))
    assert drawn.item() == expected


def test_a_longer_limit_only_adds_numbers() -> None:
    request = GenerationRequest("p", 1, (4,))
    assert (uniforms(3, 7, request, 100)[:10] == uniforms(3, 7, request, 10)).all()


def test_streams_are_unrelated() -> None:
    streams = np.stack([uniforms(0, step, GenerationRequest("p", s, ()), 4000) for step in (0, 1) for s in (0, 1)])
    correlation = np.corrcoef(streams) - np.eye(4)
    assert np.abs(correlation).max() < 0.07  # four standard deviations of 1 / sqrt(4000)
