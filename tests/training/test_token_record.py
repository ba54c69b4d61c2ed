"""What a step leaves of its tokens: as a whole forward pass says it, whatever the layout, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sead.config.run import load_config
from megatron_sead.reporting.token_records import COLUMNS, LIKELIEST, read_token_record, token_record_path
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.training.seen_tokens import NOBODY
from megatron_sead.training.token_record import steps_to_record, watched
from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, SHORT, TINY, metrics_of, train_tiny

MODELS = ROOT / "examples" / "tiny"
SETTINGS = ["training.steps=2", "reporting.token_rollouts=3", "training.global_batch_size=8"]
TP2 = ["parallel.tensor_model_parallel_size=2"]
PACKED = ["training.micro_batch_size=1", "training.micro_batch_tokens=400"]
LAYOUTS = {
    "tp2 sequence parallel": (2, [*TP2, "parallel.sequence_parallel=true", "training.micro_batch_size=2"]),
    "pp2": (2, ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=2"]),
    "dp2": (2, ["training.micro_batch_size=4"]),
    "packed, cp2": (2, [*PACKED, "parallel.context_parallel_size=2"]),
}


@pytest.fixture(scope="module")
def run(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokens") / "run"
    assert train_tiny(pools, 1, output, SETTINGS) == [True]
    return output


def record(run: Path, step: int = 0) -> dict[str, Any]:
    return read_token_record(token_record_path(run, step))


def test_a_record_says_what_whole_forward_passes_say(run: Path) -> None:
    """Of the first step, whose student is the one in its directory."""
    models = [
        AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32) for name in ("student", "teacher")
    ]
    rollouts = {r["prompt_id"]: r for r in map(json.loads, (run / "rollouts/step-0.jsonl").read_text().splitlines())}
    found = record(run)
    assert len(found["rollouts"]) == 3
    for rollout in found["rollouts"]:
        recorded = rollouts[rollout["prompt_id"]]
        assert rollout["token_ids"] == recorded["response_token_ids"] and rollout["zones"] == recorded["zones"]
        ids = torch.tensor([recorded["prompt_token_ids"] + recorded["response_token_ids"]])
        first = len(recorded["prompt_token_ids"]) - 1
        with torch.no_grad():
            p, q = (model(ids).logits[0, first:-1].double().log_softmax(-1) for model in models)
        targets = torch.tensor(recorded["response_token_ids"])[:, None]
        expected = {
            "student_entropy": -(p.exp() * p).sum(-1),
            "teacher_entropy": -(q.exp() * q).sum(-1),
            "forward_kl": (q.exp() * (q - p)).sum(-1),
            "reverse_kl": (p.exp() * (p - q)).sum(-1),
            "student_log_prob": p.gather(1, targets)[:, 0],
            "teacher_log_prob": q.gather(1, targets)[:, 0],
        }
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(rollout[name]).double(), values, rtol=1e-3, atol=2e-4, msg=name)
        for name, chooses in zip(LIKELIEST, (p, q), strict=True):
            told = torch.tensor(rollout[name])
            best = chooses.topk(3).indices
            torch.testing.assert_close(told[..., 0].long(), best)
            for column, of_model in ((1, p), (2, q)):
                torch.testing.assert_close(
                    told[..., column].double(), of_model.gather(1, best).exp(), rtol=6e-3, atol=1e-5
                )


def test_texts_make_the_response_and_name_the_stop_token(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student")
    for rollout in record(run)["rollouts"]:
        assert "".join(rollout["texts"]) == tokenizer.decode(rollout["token_ids"])
        assert rollout["finished"] == (rollout["token_ids"][-1] == tokenizer.eos_token_id)
        assert rollout["question"] and rollout["answers"]


def test_a_run_ends_with_its_report_and_what_it_needs(run: Path) -> None:
    html = (run / "report.html").read_text()
    shown = record(run, 1)["rollouts"][0]
    assert shown["prompt_id"] in html and json.dumps(shown["question"])[1:-1] in html
    (start,) = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 0 and start["ranks"] == 1 and start["prompts"] == 1000 and start["plan"]["peak_bytes"] > 0
    assert all(line["peak_memory"] > 0 for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


def test_weights_say_which_zones_taught(run: Path) -> None:
    for rollout in record(run)["rollouts"]:
        weights = zip(rollout["zones"], rollout["forward_weight"], rollout["reverse_weight"], strict=True)
        for zone, forward, reverse in weights:
            assert (forward > 0, reverse > 0) == {"A": (False, False), "B": (False, True), "C": (True, True)}[zone]


def test_points_are_of_the_whole_step(run: Path) -> None:
    points, metrics = record(run)["all_tokens"], metrics_of(run)[0]
    assert len(points["zones"]) == record(run)["tokens"] == metrics["response_tokens"]
    for name in ("student_entropy", "reverse_kl"):
        assert sum(points[name]) / len(points[name]) == pytest.approx(metrics[name], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_leaves_the_same_record(layout: str, pools: RankPools, run: Path, tmp_path: Path) -> None:
    ranks, overrides = LAYOUTS[layout]
    replay = ["rollouts.engine=replay", f"rollouts.path={run}", "training.normalizer=valid"]
    train_tiny(pools, 1, tmp_path / "one", [*SETTINGS, *replay])
    train_tiny(pools, ranks, tmp_path / "run", [*SETTINGS, *replay, *overrides])
    expected, found = record(tmp_path / "one"), record(tmp_path / "run")
    assert [r["prompt_id"] for r in found["rollouts"]] == [r["prompt_id"] for r in expected["rollouts"]]
    for ours, theirs in zip(found["rollouts"], expected["rollouts"], strict=True):
        assert ours["zones"] == theirs["zones"] and ours["texts"] == theirs["texts"]
        for name in COLUMNS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        for name in LIKELIEST:
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1.5e-2, atol=1e-6)
    assert sorted(found["all_tokens"]["zones"]) == sorted(expected["all_tokens"]["zones"])


def test_recording_changes_no_bit_of_the_run(pools: RankPools, run: Path, tmp_path: Path) -> None:
    train_tiny(pools, 1, tmp_path / "run", [*SETTINGS, "reporting.token_steps=0"])
    assert not (tmp_path / "run" / "tokens").exists()
    assert metrics_of(tmp_path / "run") == metrics_of(run)
    ours, theirs = ((folder / "student-hf/model.safetensors").read_bytes() for folder in (tmp_path / "run", run))
    assert ours == theirs


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(0, 9, set()), (1, 9, {8}), (2, 9, {0, 8}), (5, 9, {0, 2, 4, 6, 8}), (20, 3, {0, 1, 2}), (3, 1, {0})],
)
def test_recorded_steps_are_spread_over_the_run(count: int, steps: int, expected: set[int]) -> None:
    assert steps_to_record(count, steps) == expected


def test_no_room_leaves_statistics_alone(pools: RankPools, run: Path, tmp_path: Path) -> None:
    replay = ["rollouts.engine=replay", f"rollouts.path={run}", "training.steps=1", "reporting.token_megabytes=0.001"]
    train_tiny(pools, 1, tmp_path / "run", [*SETTINGS, *replay])
    found = record(tmp_path / "run")
    assert found["rollouts"] == [] and len(found["all_tokens"]["zones"]) == found["tokens"]


def rollout_of(tokens: int) -> Rollout:
    return Rollout("p", 0, (1,), (1,) * tokens, True, None)


def test_what_is_recorded_fits_the_megabytes() -> None:
    config = load_config(TINY, [*SHORT, "output=x", "training.steps=100", "reporting.token_steps=10"])
    reporting = config.reporting
    reporting.token_megabytes = 4.8  # 1,000 tokens a step
    long = [rollout_of(400) for _ in range(32)]
    assert watched(config, 1, long) is NOBODY
    seen = watched(config, 0, long)
    assert seen.rollouts == (0, 4) and seen.most_tokens == 1000
    assert watched(config, 0, [rollout_of(3000) for _ in range(32)]).rollouts == (0,)  # its beginning
    assert len(watched(config, 0, [rollout_of(10) for _ in range(32)]).rollouts) == 8
