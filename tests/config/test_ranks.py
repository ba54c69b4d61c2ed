"""Ranks that a layout divides, and budgets of tokens that hold the longest rollout."""

from __future__ import annotations

import pytest

from megatron_sead.config.checks import check_world_size
from megatron_sead.config.micro_batches import check_token_budget
from megatron_sead.errors import UserError
from tests.config.test_run import config


@pytest.mark.parametrize(("world_size", "expected"), [(2, 1), (4, 2), (8, 4)])
def test_data_parallel_size_is_what_is_left(world_size: int, expected: int) -> None:
    assert check_world_size(config("parallel.tensor_model_parallel_size=2"), world_size) == expected


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (["parallel.tensor_model_parallel_size=2"], 3, ["3 ranks", "multiple of 2"]),
        (["parallel.tensor_model_parallel_size=2"], 1, ["1 rank: must", "multiple of 2"]),
        ([], 3, ["global_batch_size=8", "multiple of 3", "6 or 9"]),
        ([], 16, ["global_batch_size=8", "multiple of 16", "example 16:"]),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "training.micro_batch_size=8",
            ],
            2,
            ["multiple of 16", "2 pipeline stages"],
        ),
        (["training.micro_batch_tokens=9000"], 16, ["training.global_batch_size=8", "at least 16"]),
    ],
)
def test_ranks_that_do_not_fit_are_refused(overrides: list[str], world_size: int, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_world_size(config(*overrides), world_size)
    assert all(part in str(caught.value) for part in parts)


def test_a_budget_of_tokens_asks_for_a_rollout_a_replica_and_no_more() -> None:
    virtual = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    budget = ["training.global_batch_size=7", "training.micro_batch_tokens=9000"]
    assert check_world_size(config(*budget), 7) == 7
    assert check_world_size(config(*budget, *virtual), 6) == 3


CP4 = ["parallel.context_parallel_size=4"]
TP4_SP = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]


@pytest.mark.parametrize(
    ("overrides", "longest", "parts"),
    [
        (["prompts.max_prompt_tokens=100"], 1, ["=1023: must be at least 1100", "prompts.max_prompt_tokens=100 and"]),
        (["prompts.max_prompt_tokens=24"], 1, ["=1023: must be at least 1024", "rollouts.max_new_tokens=1000"]),
        ([], 24, ["=1023: must be at least 1024", "a prompt of 24 tokens"]),
        ([*TP4_SP], 21, ["=1023: must be at least 1024", "in 4 equal parts (parallel.sequence_parallel)"]),
        (CP4, 21, ["=1023: must be at least 1024", "in 8 equal parts (parallel.context_parallel_size)"]),
        ([*TP4_SP, *CP4], 25, ["=1023: must be at least 1040", "in 16 equal parts"]),
        (["training.attention_backend=transformer_engine", "training.precision=fp32"], 1, ["'bf16'", "'torch'"]),
    ],
    ids=str,
)
def test_a_budget_that_does_not_hold_the_longest_rollout_is_refused(
    overrides: list[str], longest: int, parts: list[str]
) -> None:
    fixed = ["training.micro_batch_tokens=1023", "rollouts.max_new_tokens=1000", *overrides]
    with pytest.raises(UserError) as caught:
        check_token_budget(config(*fixed), longest)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("training.micro_batch_tokens=1023: ")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        (["prompts.max_prompt_tokens=23"], 1),
        ([], 23),
        ([*TP4_SP], 20),
        (CP4, 16),
        (["training.attention_backend=transformer_engine"], 1),
        (["training.micro_batch_tokens=null"], 9999),
    ],
    ids=str,
)
def test_a_budget_that_just_holds_it_is_accepted(overrides: list[str], longest: int) -> None:
    fixed = ["training.micro_batch_tokens=1023", "rollouts.max_new_tokens=1000", *overrides]
    check_token_budget(config(*fixed), longest)


def test_transformer_engine_shares_sequences_in_bf16_alone() -> None:
    with pytest.raises(UserError, match=r"^parallel.context_parallel_size=4: .*'bf16', not 'fp32'"):
        check_token_budget(config(*CP4, "training.attention_backend=transformer_engine", "training.precision=fp32"))
    check_token_budget(config(*CP4, "training.attention_backend=transformer_engine"))
