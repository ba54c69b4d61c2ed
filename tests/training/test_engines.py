"""The engine is asked in the order of its protocol, and one that writes with other weights ends the run in a line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, SHORT, TINY

SETTINGS = [*SHORT, "training.steps=2", "training.global_batch_size=8", "rollouts.max_new_tokens=8"]
HELDOUT = [f"evaluation.path={ROOT / 'examples' / 'tiny' / 'heldout.jsonl'}", "evaluation.limit=4"]
HELDOUT += ["evaluation.samples=0", "evaluation.teacher=false"]
VERBS = ("generate", "load_weights", "score", "sleep", "wake", "close")


def drive(overrides: list[str], fault: str | None) -> tuple[list[str], list[str]]:
    """On a rank: a run, with a fault in its engine; what the engine was asked, and what was logged."""
    from megatron_sead.config.run import load_config
    from megatron_sead.training import loop

    with listening() as lines, watching(fault) as asked:
        loop.run(load_config(TINY, overrides))
    return asked, lines


@contextmanager
def listening() -> Iterator[list[str]]:
    """Lines that the package logs."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, handler = logging.getLogger("megatron_sead"), Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def watching(fault: str | None) -> Iterator[list[str]]:
    """Verbs that a transformers engine is asked. With a fault it never sleeps, and its load_weights does what the fault
    says from the second time on; or it dies, once it has written, of the verb that the fault is named by; or it has
    numbers that are not finite of a student whose own are."""
    from megatron_sead.errors import NotFiniteNumbers
    from megatron_sead.rollouts.engine import EngineFailed
    from megatron_sead.rollouts.transformers_engine import TransformersEngine

    asked: list[str] = []
    whole = {verb: getattr(TransformersEngine, verb) for verb in VERBS}

    def watched(verb: str) -> Callable[..., Any]:
        def call(engine: Any, *arguments: Any, **keywords: Any) -> Any:
            asked.append(verb)
            if verb == fault and "generate" in asked:
                raise EngineFailed("rollouts.engine='transformers': out of memory")
            if fault == "no number" and asked.count("generate") > 1:
                raise NotFiniteNumbers("rollout of prompt 'a': the model's logits of token 3 are not finite")
            if verb == "sleep" and fault in FAULTS:
                return None
            if verb == "load_weights" and fault in FAULTS and asked.count(verb) > 1:
                return FAULTS[fault](engine, whole[verb], *arguments)
            return whole[verb](engine, *arguments, **keywords)

        return call

    for verb in VERBS:
        setattr(TransformersEngine, verb, watched(verb))
    try:
        yield asked
    finally:
        for verb, method in whole.items():
            setattr(TransformersEngine, verb, method)


def keep_old(engine: Any, load: Any, weights: Any) -> None:
    list(weights)


def keep_one(engine: Any, load: Any, weights: Any) -> None:
    """One layer's weight stays as it was."""
    old = {name: p.clone() for name, p in engine.model.named_parameters() if name.endswith("1.mlp.down_proj.weight")}
    assert len(old) == 1
    load(engine, ((name, old.get(name, tensor)) for name, tensor in weights))


def spoil(engine: Any, load: Any, weights: Any) -> None:
    load(engine, ((name, tensor * float("nan")) for name, tensor in weights))


FAULTS = {"old weights": keep_old, "one old weight": keep_one, "not finite": spoil}


def run(pools: RankPools, output: Path, *overrides: str, fault: str | None = None) -> tuple[list[str], list[str]]:
    (answer,) = pools.of(1).run(drive, [*SETTINGS, f"output={output}", *overrides], fault)
    return answer


@pytest.fixture(scope="module")
def whole(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("whole") / "run"
    asked, lines = run(pools, output, *HELDOUT)
    compared = [line for line in lines if line.startswith("rollouts.engine=transformers and student: log-prob")]
    assert len(compared) == 1 and compared[0].endswith(" nats over 95 tokens, 1e-04 are allowed")
    return output, asked


def test_the_engine_sleeps_while_the_student_trains_and_is_checked_after_every_update(
    whole: tuple[Path, list[str]],
) -> None:
    renewed = ["wake", "load_weights", "score"]
    step = ["generate", "sleep", *renewed]
    assert whole[1] == [*renewed, "generate", *step, *step, "generate", "close"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("old weights", "rollouts.engine=transformers: still writes with old weights"),
        ("one old weight", "rollouts.engine=transformers and the student do not agree: log-probabilities differ by"),
        ("not finite", "rollouts.engine=transformers and the student do not agree: log-probabilities differ by inf"),
    ],
)
def test_an_engine_with_other_weights_ends_the_run(pools: RankPools, tmp_path: Path, fault: str, told: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run(pools, tmp_path / "run", "training.lr_warmup_steps=0", fault=fault)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith(f"megatron_sead.errors.UserError: {told}"), last


def test_an_engine_whose_numbers_alone_are_not_finite_costs_no_step(pools: RankPools, tmp_path: Path) -> None:
    """vLLM has been seen to say NaN of a token that is all but certain, in other trainers."""
    output = tmp_path / "run"
    with pytest.raises(AssertionError) as caught:
        run(pools, output, fault="no number")
    told = (
        "rollouts.engine='transformers': rollout of prompt 'a': the model's logits of token 3 are not finite, and the "
    )
    assert f"UserError: {told}student's are; saved after 1 step, the same command continues" in str(caught.value)
    assert [folder.name for folder in (output / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert not (output / "not-finite").exists()


def drive_with_a_fault_on_rank_1(overrides: list[str]) -> None:
    drive(overrides, "one old weight" if dist.get_rank() == 1 else None)


def test_an_engine_with_other_weights_on_one_rank_ends_all(pools: RankPools, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"output={tmp_path / 'run'}", "training.lr_warmup_steps=0", "training.micro_batch_size=4"]
    with pytest.raises(AssertionError) as caught:
        pools.of(2).run(drive_with_a_fault_on_rank_1, settings)
    assert str(caught.value).count("UserError: rollouts.engine=transformers and the student do not agree: ") == 2


def drive_dying_on_rank_1(overrides: list[str], verb: str) -> None:
    drive(overrides, verb if dist.get_rank() == 1 else None)


@pytest.mark.parametrize(("verb", "saved"), [("sleep", 0), ("wake", 1), ("load_weights", 1), ("score", 1)])
def test_an_engine_that_dies_on_one_rank_ends_all_and_the_student_is_saved(
    pools: RankPools, tmp_path: Path, verb: str, saved: int
) -> None:
    output = tmp_path / "run"
    settings = [*SETTINGS, f"output={output}", "training.micro_batch_size=4", "checkpoints.interval=0"]
    with pytest.raises(AssertionError) as caught:
        pools.of(2).run(drive_dying_on_rank_1, settings, verb)
    told = f"UserError: rollouts.engine='transformers': out of memory; saved after {saved} step"
    assert str(caught.value).count(f"{told}{'' if saved == 1 else 's'}, the same command continues") == 2
    assert [folder.name for folder in (output / "checkpoints").glob("step-*")] == [f"step-0000000{saved}"]
    assert len((output / "metrics.jsonl").read_text().splitlines()) == saved
    if saved == 0:  # one that goes on shows that all do
        _, lines = pools.of(2).run(drive, settings, None)[0]
        assert "continuing at step 0" in lines


def test_replay_is_not_checked_and_says_so(pools: RankPools, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Held-out prompts are answered by transformers in its place."""
    replay = ["rollouts.engine=replay", f"rollouts.path={whole[0]}"]
    asked, lines = run(pools, tmp_path / "run", *replay, *HELDOUT)
    assert "rollouts.engine=replay: comes without weights; that its responses are the student's is not checked" in lines
    assert asked == ["generate", "close", "generate", "close"]


@pytest.mark.parametrize(("context", "length"), [(256, 96), (97, 96), (96, 95), (40, 39)])
def test_a_probe_leaves_room_for_the_token_that_vllm_writes_after_it(tmp_path: Path, context: int, length: int) -> None:
    """64 tokens more than the rotary length of 32, if the context holds so many."""
    from megatron_sead.training.parity import probe_tokens

    values = json.loads((ROOT / "examples" / "tiny" / "student" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"max_position_embeddings": context}))
    assert len(probe_tokens(tmp_path, [(5, 6, 7)])) == length


def test_a_bf16_engine_that_stands_still_is_seen_though_it_is_close() -> None:
    from megatron_sead.training.engines import _engine_alone_stands_still
    from megatron_sead.training.run import EngineScores

    before = EngineScores(torch.zeros(9), torch.zeros(9))
    assert _engine_alone_stands_still(before, EngineScores(torch.zeros(9), torch.full((9,), 1e-6)))
    assert not _engine_alone_stands_still(before, EngineScores(torch.full((9,), 1e-7), torch.full((9,), 1e-6)))
    assert not _engine_alone_stands_still(before, EngineScores(torch.zeros(9), torch.zeros(9)))
