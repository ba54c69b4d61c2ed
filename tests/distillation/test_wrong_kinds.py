"""Numbers as weights are the weights of all tokens; what is no number is refused in a line, and never gets a zone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from megatron_sead.distillation import (
    CompetenceTracker,
    Curriculum,
    PolicyInput,
    RunningThresholds,
    Thresholds,
    TokenStatistics,
    annealing_coefficient,
    assign_zones,
    assign_zones_by_threshold,
    assign_zones_per_sequence,
    linear_weighted_divergence,
    make_policy,
    rescue_confident_errors,
    token_statistics,
    vocab_parallel_entropy,
    weighted_divergence,
    zones_and_thresholds,
)
from megatron_sead.distillation.baselines import top_k_divergence

NAN, INF = float("nan"), float("inf")
TOKENS, COLUMNS, HIDDEN = 4, 12, 6

torch.manual_seed(0)
LOGITS = torch.randn(TOKENS, COLUMNS), torch.randn(TOKENS, COLUMNS)
HEADS = tuple(torch.randn(size, HIDDEN) for size in (TOKENS, COLUMNS, TOKENS, COLUMNS))
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "weighted_divergence": lambda f, r: weighted_divergence(*LOGITS, f, r),
    "linear_weighted_divergence": lambda f, r: linear_weighted_divergence(*HEADS, f, r),
    "top_k_divergence": lambda f, r: top_k_divergence(*LOGITS, f, r, k=3),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", [0.5, 2, 0, torch.full((TOKENS,), 3)])
def test_a_number_is_the_weight_of_all_tokens(loss: str, weight: Any) -> None:
    function = LOSSES[loss]
    expected = function(torch.full((TOKENS,), float(torch.as_tensor(weight).flatten()[0])), torch.ones(TOKENS))
    assert torch.equal(function(weight, 1.0), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", [[0.5] * TOKENS, numpy.ones(TOKENS), None, "1", torch.ones(TOKENS) * 1j, NAN])
def test_other_weights_are_refused(loss: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"_weight.*(must be a tensor|must be real)|NaN"):
        LOSSES[loss](1.0, wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda: weighted_divergence(LOGITS[0].numpy(), LOGITS[1], 1.0, 1.0),
        lambda: weighted_divergence(LOGITS[0], LOGITS[1].tolist(), 1.0, 1.0),
        lambda: linear_weighted_divergence(HEADS[0].tolist(), *HEADS[1:], 1.0, 1.0),
        lambda: token_statistics(*(logits.tolist() for logits in LOGITS)),
        lambda: vocab_parallel_entropy(LOGITS[0].tolist()),
        lambda: assign_zones([0.5], [0.5], [True]),
        lambda: assign_zones(torch.ones(1), torch.ones(1), [True]),
    ],
)
def test_what_is_no_tensor_is_named(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"^(\w+): must be a torch.Tensor, not (ndarray|list)$"):
        call()


ZONES: dict[str, Callable[..., Any]] = {
    "assign_zones": assign_zones,
    "zones_and_thresholds": lambda *columns: zones_and_thresholds(*columns)[0],
    "assign_zones_by_threshold": lambda s, t, v: assign_zones_by_threshold(s, t, v, Thresholds(0.5, 0.5)),
    "assign_zones_per_sequence": lambda s, t, v: assign_zones_per_sequence(s, t, v, torch.zeros(len(s)).long()),
}


@pytest.mark.parametrize("function", ZONES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("model", [0, 1])
def test_an_entropy_that_is_no_number_has_no_zone(function: str, value: float, model: int) -> None:
    entropies = torch.rand(2, 10)
    entropies[model, 3] = value
    with pytest.raises(ValueError, match=r"(student|teacher)_entropy of 1 valid tokens is not finite"):
        ZONES[function](*entropies, torch.ones(10).bool())
    valid = torch.arange(10) != 3
    clean = entropies.nan_to_num(0.0, 0.0, 0.0)
    found, expected = (ZONES[function](*rows, valid) for rows in (entropies, clean))
    assert torch.equal(found, expected)


STATISTICS = [torch.rand(3) for _ in range(4)]


def policy_input(alpha: float = 0.5, zones: tuple[int, ...] = (0, 1, 2)) -> PolicyInput:
    index = torch.arange(3)
    statistics = TokenStatistics(*(values.clone() for values in STATISTICS), torch.ones(3).bool())
    return PolicyInput(statistics, torch.tensor(zones, dtype=torch.int8), torch.zeros_like(index), index, alpha, 0)


@pytest.mark.parametrize("name", ["sead", "opd", "eopd", "annealing", "tip_entropy", "tip_soft_or"])
def test_a_policy_takes_no_nan(name: str) -> None:
    policy, spoilt = make_policy(name), policy_input()
    policy(spoilt)
    for field in ("student_entropy", "reverse_kl"):
        spoilt = policy_input()
        getattr(spoilt.statistics, field)[1] = NAN
        with pytest.raises(ValueError, match=f"{field} of 1 valid tokens is NaN, the first is token 1"):
            policy(spoilt)
        spoilt.zones[1] = -1
        policy(spoilt)
    with pytest.raises(ValueError, match="alpha is NaN"):
        policy(policy_input(alpha=NAN))


@pytest.mark.parametrize(
    "call",
    [
        lambda: annealing_coefficient(NAN),
        lambda: annealing_coefficient(0.5, start=NAN),
        lambda: annealing_coefficient(0.5, end=INF),
        lambda: CompetenceTracker().update(NAN),
        lambda: Curriculum([0.5, NAN], batch_size=1, total_steps=2),
        lambda: Curriculum([0.5, 0.5], batch_size=1, total_steps=2, c0=NAN),
        lambda: Curriculum([0.5, 0.5], batch_size=1, total_steps=2, mode="sorted", noise=NAN),
        lambda: make_policy("eopd", entropy_gate=NAN),
        lambda: make_policy("sead", zone_c_scale=INF),
        lambda: make_policy("random_half", keep_share=NAN),
        lambda: RunningThresholds(decay=NAN),
        lambda: RunningThresholds(decay=0.5).update(Thresholds(NAN, 0.5)),
        lambda: assign_zones(*torch.rand(2, 4), torch.ones(4).bool(), shares=(NAN, 50, 50)),
        lambda: assign_zones_by_threshold(*torch.rand(2, 4), torch.ones(4).bool(), Thresholds(NAN, 0.5)),
        lambda: rescue_confident_errors(torch.zeros(2, dtype=torch.int8), torch.tensor([NAN, 1.0]), 0.5),
        lambda: rescue_confident_errors(torch.zeros(2, dtype=torch.int8), torch.ones(2), NAN),
    ],
)
def test_no_function_takes_nan(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"nan|NaN|inf|difficulties|difficulty|shares"):
        call()
