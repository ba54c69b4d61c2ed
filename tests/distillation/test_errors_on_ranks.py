"""One rank's bad input is every rank's error: the message names the rank, and no rank is left in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sead.distillation import (
    assign_zones,
    linear_token_scores,
    linear_weighted_divergence,
    token_statistics,
    vocab_parallel_entropy,
    weighted_divergence,
)
from megatron_sead.distillation.baselines import (
    generalized_jsd,
    sampled_token_loss,
    top_k_divergence,
    top_k_entropy,
)
from tests.distillation.ranks import Groups, Ranks

TOKENS, COLUMNS, HIDDEN = 6, 20, 8

Arguments = dict[str, Any]


def good_logits() -> Arguments:
    torch.manual_seed(0)
    return {"student_logits": torch.randn(TOKENS, COLUMNS), "teacher_logits": torch.randn(TOKENS, COLUMNS)}


def good_weights() -> Arguments:
    return {"forward_weight": torch.ones(TOKENS), "reverse_weight": torch.ones(TOKENS)}


def good_heads() -> Arguments:
    torch.manual_seed(0)
    return {
        "student_hidden": torch.randn(TOKENS, HIDDEN),
        "student_head": torch.randn(COLUMNS, HIDDEN),
        "teacher_hidden": torch.randn(TOKENS, HIDDEN),
        "teacher_head": torch.randn(COLUMNS, HIDDEN),
    }


def no_stops() -> Arguments:
    return {"targets": torch.arange(TOKENS), "student_stop_token_ids": (), "teacher_stop_token_ids": ()}


def good_samples() -> Arguments:
    return {"targets": torch.arange(TOKENS), "old_log_probs": torch.full((TOKENS,), -4.0)}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "token_statistics": (token_statistics, good_logits),
    "vocab_parallel_entropy": (vocab_parallel_entropy, lambda: {"logits": good_logits()["student_logits"]}),
    "weighted_divergence": (weighted_divergence, lambda: good_logits() | good_weights()),
    "linear_weighted_divergence": (linear_weighted_divergence, lambda: good_heads() | good_weights()),
    "linear_token_scores": (linear_token_scores, lambda: good_heads() | no_stops()),
    "generalized_jsd": (generalized_jsd, lambda: good_logits() | {"beta": 0.5}),
    "sampled_token_loss": (sampled_token_loss, lambda: good_logits() | good_samples()),
    "top_k_divergence": (top_k_divergence, lambda: good_logits() | good_weights() | {"k": 3}),
    "top_k_entropy": (top_k_entropy, lambda: {"logits": good_logits()["student_logits"], "k": 3}),
}


def nan_at(name: str) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        arguments[name][4, 3] = torch.nan

    return spoil


def with_value(name: str, value: Any) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update({name: value})


FAULTS: dict[str, tuple[str, Callable[[Arguments], None], str]] = {
    "nan, student": ("token_statistics", nan_at("student_logits"), "student logits of token 4 (of 6) are NaN"),
    "nan, teacher": ("token_statistics", nan_at("teacher_logits"), "teacher logits of token 4 (of 6) are NaN"),
    "nan, entropy": ("vocab_parallel_entropy", nan_at("logits"), "logits of token 4 (of 6) are NaN"),
    "nan, loss": ("weighted_divergence", nan_at("student_logits"), "student logits of token 4 (of 6) are NaN"),
    "nan, head": ("linear_weighted_divergence", nan_at("teacher_head"), "teacher logits of token 0 (of 6) are NaN"),
    "nan, scores": ("linear_token_scores", nan_at("student_head"), "student logits of token 0 (of 6) are NaN"),
    "type": ("token_statistics", with_value("teacher_logits", torch.zeros(TOKENS, COLUMNS).double()), "float64"),
    "type, entropy": ("vocab_parallel_entropy", with_value("logits", torch.zeros(TOKENS, COLUMNS).int()), "int32"),
    "list": ("weighted_divergence", with_value("forward_weight", [1.0]), "forward_weight: must be a tensor"),
    "list, fused": ("linear_weighted_divergence", with_value("reverse_weight", [1.0]), "reverse_weight: must be"),
    "length": ("weighted_divergence", with_value("reverse_weight", torch.ones(5)), "reverse_weight is [5]"),
    "vocabulary": ("weighted_divergence", with_value("vocab_size", 99), "vocab_size=99"),
    "length, fused": ("linear_weighted_divergence", with_value("forward_weight", torch.ones(7)), "weight is [7]"),
    "columns": ("linear_weighted_divergence", with_value("teacher_head", torch.zeros(19, HIDDEN)), "19 columns"),
    "nan, JSD": ("generalized_jsd", nan_at("teacher_logits"), "teacher logits of token 4 (of 6) are NaN"),
    "nan, sampled": ("sampled_token_loss", nan_at("student_logits"), "student logits of token 4 (of 6) are NaN"),
    "nan, top-k": ("top_k_divergence", nan_at("student_logits"), "student logits of token 4 (of 6) are NaN"),
    "nan, top-k entropy": ("top_k_entropy", nan_at("logits"), "logits of token 4 (of 6) are NaN"),
    "type, JSD": ("generalized_jsd", with_value("teacher_logits", torch.zeros(TOKENS, COLUMNS).double()), "float64"),
    "target, sampled": ("sampled_token_loss", with_value("targets", torch.full((TOKENS,), 99)), "token 99"),
    "length, top-k": ("top_k_divergence", with_value("reverse_weight", torch.ones(5)), "reverse_weight is [5]"),
    "k, top-k entropy": ("top_k_entropy", with_value("k", 76), "k=76"),
    "target": ("linear_token_scores", with_value("targets", torch.full((TOKENS,), 99)), "token 99"),
}


def call_on_rank(groups: Groups, fault: str, at_fault: int) -> str:
    name, spoil, _ = FAULTS[fault]
    function, good = FUNCTIONS[name]
    arguments = good()
    if dist.get_rank(groups["4"]) == at_fault:
        spoil(arguments)
    try:
        function(**arguments, **({} if "vocab_size" in arguments else {"vocab_size": 75}), group=groups["4"])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_raises_what_one_finds(ranks: Ranks, fault: str) -> None:
    for message in ranks.run(call_on_rank, fault, 2):
        assert FAULTS[fault][2] in message and "(on rank 2 of the group)" in message


def other_weights_on_rank(groups: Groups) -> str:
    arguments = good_heads() | good_weights()
    rank = dist.get_rank(groups["4"])
    arguments["forward_weight"][:rank] = arguments["reverse_weight"][:rank] = 0
    try:
        linear_weighted_divergence(**arguments, group=groups["4"])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_weights_that_differ_between_ranks_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(other_weights_on_rank):
        assert "from 3 to 6 tokens" in message


def zones_on_rank(groups: Groups) -> str:
    entropies = torch.rand(2, TOKENS)
    if dist.get_rank(groups["4"]) == 2:
        entropies[1, 4] = torch.nan
    try:
        assign_zones(*entropies, torch.ones(TOKENS).bool(), groups=[groups["4"]])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_every_rank_raises_for_an_entropy_that_one_holds(ranks: Ranks) -> None:
    for message in ranks.run(zones_on_rank):
        assert message == "teacher_entropy of 1 valid tokens is not finite, the first is token 16 of 24"


def good_on_rank(groups: Groups) -> None:
    for function, good in FUNCTIONS.values():
        function(**good(), vocab_size=75, group=groups["4"])


def test_good_input_raises_nothing(ranks: Ranks) -> None:
    ranks.run(good_on_rank)
