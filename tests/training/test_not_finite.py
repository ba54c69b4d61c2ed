"""A step whose numbers are not finite on any rank is skipped on all; a run that skips too many in a row ends in a line.

The run to compare with does the same steps without a fault, and applies no update at step `AT`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed.ranks import RankPools
from tests.training.launching import SHORT, TINY, metrics_of

STEPS, AT, LATER = 5, 2, [0, 1, 3, 4]
SETTINGS = [*SHORT, f"training.steps={STEPS}", "rollouts.max_new_tokens=8", "training.global_batch_size=8"]
TP2 = ["parallel.tensor_model_parallel_size=2", "training.micro_batch_size=4"]
DP2 = ["training.micro_batch_size=4"]  # a replica's step in one micro-batch, scored in the training pass itself
PP2 = ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=4"]
NAN = float("nan")


def train(overrides: list[str], fault: str, steps: list[int]) -> bool:
    """On each of two ranks: a run in which something happens at `steps`."""
    from megatron_sead.config.run import load_config
    from megatron_sead.training import loop

    with at_steps(steps, FAULTS[fault](dist.get_rank())):
        return loop.run(load_config(TINY, overrides))


@contextmanager
def at_steps(steps: list[int], fault: Any) -> Iterator[None]:
    """`fault` is a context around the train_step of these steps, and is given what they are given."""
    from megatron_sead.training import loop

    whole = loop.train_step

    def faulty(learner: Any, micro_batches: Any, alpha: float, step: int, *rest: Any) -> Any:
        if step not in steps:
            return whole(learner, micro_batches, alpha, step, *rest)
        with fault(learner):
            return whole(learner, micro_batches, alpha, step, *rest)

    loop.train_step = faulty
    try:
        yield
    finally:
        loop.train_step = whole


def no_update(rank: int) -> Any:
    """No fault, and no update."""
    return lambda learner: replaced("_update", lambda update: lambda learner, count, step: update(learner, 0, step))


def gradient_on_rank_1(rank: int) -> Any:
    """One element, on one of two tensor-parallel ranks, after the backward pass."""

    def spoil(schedule: Any) -> Any:
        def run(chunks: Any, *arguments: Any, **keywords: Any) -> Any:
            outcomes = schedule(chunks, *arguments, **keywords)
            if rank == 1 and not keywords["forward_only"]:
                next(chunks[0].parameters()).main_grad.view(-1)[3] = NAN
            return outcomes

        return run

    return lambda learner: replaced("run_schedule", spoil)


@contextmanager
def replaced(name: str, make: Any) -> Iterator[None]:
    from megatron_sead.training import step

    whole = getattr(step, name)
    setattr(step, name, make(whole))
    try:
        yield
    finally:
        setattr(step, name, whole)


def teacher_on_rank_1(rank: int) -> Any:
    """One token's hidden state, on one replica or on the last stage."""

    @contextmanager
    def spoil(learner: Any) -> Iterator[None]:
        hidden_states = learner.teacher.hidden_states

        def spoilt(*arguments: Any) -> Any:
            found = hidden_states(*arguments)
            if rank == 1:
                found[0] = found[0].clone()
                found[0][2] = NAN
            return found

        learner.teacher.hidden_states = spoilt
        yield
        learner.teacher.hidden_states = hidden_states

    return spoil


def weight_on_rank_1(rank: int) -> Any:
    """One weight that no text needs, after the update."""

    @contextmanager
    def spoil(learner: Any) -> Iterator[None]:
        yield
        if rank == 1:
            next(learner.student[0].parameters()).data[-1, 3] = float("inf")

    return spoil


FAULTS = {
    "no update": no_update,
    "gradient": gradient_on_rank_1,
    "teacher": teacher_on_rank_1,
    "weight": weight_on_rank_1,
}


def run(pools: RankPools, output: Path, overrides: list[str], fault: str, steps: list[int]) -> Any:
    return pools.of(2).run(train, [*SETTINGS, f"output={output}", *overrides], fault, steps)


def refusal(*arguments: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        run(*arguments)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("megatron_sead.errors.UserError: "), str(caught.value)
    return last.partition(": ")[2]


@pytest.fixture(scope="module")
def without_update(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("without") / "run"
    assert run(pools, output, TP2, "no update", [AT]) == [True, True]
    return output


@pytest.mark.mcore_lane
@pytest.mark.parametrize(("fault", "layout"), [("gradient", TP2), ("teacher", DP2), ("teacher", PP2)])
def test_a_skipped_step_changes_nothing(
    pools: RankPools, without_update: Path, tmp_path: Path, fault: str, layout: list[str]
) -> None:
    """Neither weights nor moments, two steps on; the schedule, the curriculum and competence go on."""
    output = tmp_path / "run"
    assert run(pools, output, layout, fault, [AT]) == [True, True]
    found, expected = metrics_of(output), metrics_of(without_update)
    assert [line["skipped"] for line in found] == [step == AT for step in range(STEPS)]
    assert (found[AT]["loss"], found[AT]["grad_norm"]) == (None, None)
    for key in ("learning_rate", "alpha", "eligible_prompts", "competence", "pass_rate"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected])
    for key in ("loss", "grad_norm", "tau_student", "zone_c_share"):
        assert [found[step][key] for step in LATER] == pytest.approx([expected[step][key] for step in LATER], rel=1e-4)
    if layout == TP2:
        weights, others = (load_file(o / "student-hf" / "model.safetensors") for o in (output, without_update))
        assert all(torch.equal(weights[name], others[name]) for name in others)
    assert json.loads((output / "summary.json").read_text())["skipped_steps"] == 1


def test_the_batch_of_a_skipped_step_and_what_each_rank_saw_are_kept(pools: RankPools, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = [*TP2, "training.max_skipped_steps=2"]
    told = refusal(pools, output, settings, "gradient", [1, 2])
    folder = output / "not-finite" / "step-00000002"
    assert told.startswith(
        "step 2: rank 1: the norm of its gradients is nan. 2 steps in a row were skipped, as many as "
    )
    assert str(folder) in told and "lower training.lr=0.001, in another output directory" in told
    reports = json.loads((folder / "ranks.json").read_text())
    assert [report["rank"] for report in reports] == [0, 1]
    assert reports[0]["grad_norm"] > 0 and reports[1]["grad_norm"] == "nan"
    assert (folder / "rollouts.jsonl").read_text().count("\n") == 8
    assert (folder.parent / "step-00000001").is_dir()


def test_skipped_steps_in_a_row_are_counted_over_a_resume(pools: RankPools, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = [*TP2, "training.max_skipped_steps=2", "checkpoints.interval=1"]
    assert "2 steps in a row" in refusal(pools, output, settings, "gradient", [1, 2])
    assert (output / "checkpoints" / "step-00000002").is_dir()  # the student of step 0, and a count of 1
    told = refusal(pools, output, settings, "gradient", [2])
    assert told.startswith("step 2: ") and "2 steps in a row" in told and "From " in told
    assert run(pools, output, [*TP2, "training.max_skipped_steps=3"], "gradient", [2]) == [True, True]


def test_a_student_that_is_spoilt_is_not_saved(pools: RankPools, tmp_path: Path) -> None:
    """`keep` would let an older checkpoint go for it."""
    output = tmp_path / "run"
    told = refusal(pools, output, [*TP2, "checkpoints.interval=2", "checkpoints.keep=1"], "weight", [3])
    assert told.startswith("after 4 steps: weights of the student are not finite; no checkpoint is written. From ")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
    shutil.rmtree(output)


def test_a_learning_rate_that_spoils_the_student_ends_the_run_in_a_line(pools: RankPools, tmp_path: Path) -> None:
    output = tmp_path / "run"
    told = refusal(pools, output, [*TP2, "training.lr=1e30", "training.lr_warmup_steps=0"], "no update", [])
    assert told.startswith("step 1: rollout of prompt ") and "logits of token 0 are not finite" in told
    assert "lower training.lr=1e+30, in another output directory" in told
    reports = json.loads((output / "not-finite" / "step-00000001" / "ranks.json").read_text())
    assert len(reports) == 2 and len(reports[0]["prompts"]) == 8
    assert not (output / "checkpoints").exists()
