"""How few layers and micro-batches a trace takes, and what it is asked for on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.commands.train import _chosen_ranks
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.errors import UserError
from megatron_sead.planning.plan import Plan, make_plan
from megatron_sead.tracing.extend import (
    Summary,
    all_sizes,
    extended,
    few_micro_batches,
    few_parts,
    parts_in_all,
    pinned_bytes,
    with_layers,
)
from megatron_sead.tracing.memory import PINNED

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"
PP2, PP4 = (f"parallel.pipeline_model_parallel_size={stages}" for stages in (2, 4))


def planned(size: str, *overrides: str) -> tuple[RunConfig, Plan]:
    shapes = [f"student.path={SHAPES / f'olmo3-{size}'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    config = load_config(ROOT / f"examples/configs/sead_{size}.yaml", [*shapes, *overrides])
    return config, make_plan(config, 32)


@pytest.mark.parametrize(
    ("size", "overrides", "parts"),
    [
        ("7b", [], 8),
        ("7b", [PP2], 4),
        ("32b", [], 8),
        ("32b", [PP4], 4),
        ("32b", [PP4, "parallel.virtual_pipeline_model_parallel_size=4"], 1),
    ],
)
def test_every_stage_keeps_whole_patterns_of_layers(size: str, overrides: list[str], parts: int) -> None:
    config, plan = planned(size, *overrides)
    assert parts_in_all(config, plan) == parts
    assert few_parts(config, plan) == ([1, 2] if parts > 2 else [parts])


def test_fewer_layers_are_a_model_of_the_same_kind(tmp_path: Path) -> None:
    config, plan = planned("7b", PP2)
    smaller = with_layers(config, plan, 1, tmp_path)
    student, teacher = (
        json.loads((model.path / "config.json").read_text()) for model in (smaller.student, smaller.teacher)
    )
    assert (student["num_hidden_layers"], teacher["num_hidden_layers"]) == (8, 16)
    assert student["layer_types"] == (["sliding_attention"] * 3 + ["full_attention"]) * 2
    assert make_plan(smaller, 32).micro_batches == plan.micro_batches


def test_micro_batches_fill_the_pipeline() -> None:
    assert few_micro_batches(*planned("7b")) == [2, 3]
    assert few_micro_batches(*planned("32b", PP4)) == [4, 5]
    assert few_micro_batches(*planned("32b", "parallel.virtual_pipeline_model_parallel_size=2")) == [2, 4]
    assert few_micro_batches(*planned("7b", "training.micro_batch_tokens=221184")) == [2]


def test_numbers_grow_with_layers_and_micro_batches_and_with_both() -> None:
    def number(part: int, count: int) -> dict[int, Summary]:
        return {0: Summary(0, 0, {("flops", "teacher"): 5 + 7 * part + 11 * count + 13 * part * count})}

    samples = {(part, count): number(part, count) for part in (1, 2) for count in (2, 3)}
    assert extended(samples, 0, [1, 2], [2, 3], (8, 24), {}) == number(8, 24)[0].numbers
    assert extended(samples, 0, [2], [3], (2, 3), {}) == number(2, 3)[0].numbers


def test_slabs_are_those_of_all_layers() -> None:
    """A slab of 2**30 bytes is filled by three layers here; the last one is rounded up."""
    first, layer, last = 2**20, 300 * 2**20, 2**10
    by_part = {part: [[first, *[layer, 256] * part, last]] for part in (1, 2)}
    assert all_sizes(by_part, 4) == [[first, *[layer, 256] * 4, last]]
    assert pinned_bytes(all_sizes(by_part, 4)) == 2**30 + 2**29
    states = {part: 1000.0 + pinned_bytes(sizes) for part, sizes in by_part.items()}
    samples = {(part, 2): {0: Summary(0, 0, {("peak", ("teacher", PINNED)): states[part]})} for part in (1, 2)}
    (value,) = extended(samples, 0, [1, 2], [2], (4, 2), by_part).values()
    assert value == 1000 + 2**30 + 2**29


def test_ranks_of_the_first_and_the_last_stage_are_traced_unless_told() -> None:
    config, _ = planned("32b")
    assert _chosen_ranks(None, 32, config) == [0, 16]
    assert _chosen_ranks(None, 32, planned("7b")[0]) == [0]
    assert _chosen_ranks("17, 3,3", 32, config) == [3, 17]


@pytest.mark.parametrize("text", ["32", "-1", "a", "", "0,,1"])
def test_what_is_no_rank_is_told(text: str) -> None:
    with pytest.raises(UserError, match="ranks from 0 to 31"):
        _chosen_ranks(text, 32, planned("32b")[0])


@pytest.mark.parametrize("budget", [16384, 18432, 18439])
def test_what_the_longest_rollouts_leave_of_a_budget_is_filled(budget: int) -> None:
    from megatron_sead.tracing.step import Rollouts

    sizes = ["rollouts.max_new_tokens=3072", "prompts.max_prompt_tokens=1024", f"training.micro_batch_tokens={budget}"]
    config, _ = planned("7b", *sizes)
    found = Rollouts(3, 1024, 3072).of_a_step(config, 2)
    assert sum(map(sum, found)) == 3 * 2 * (budget // 8 * 8)
    assert found.count((1024, 3072)) == 3 * 2 * 4
    assert all(prompt > 0 and response > 0 and prompt <= response for prompt, response in found)
