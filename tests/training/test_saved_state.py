"""What a checkpoint says of a run is checked before a run goes on with it; which signals end one early."""

from __future__ import annotations

import random
import signal
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from megatron_sead.errors import UserError

SAVED: dict[str, Any] = {"step": 4, "seconds": 1.5, "probe_tokens": [1, 2, 3], "probe_log_probs": [-1.0, -2.0]}


def progress(**changes: Any) -> Any:
    from megatron_sead.training.run import Run  # imports Megatron: not to be collected

    training = SimpleNamespace(steps=6)
    learner = SimpleNamespace(heads=SimpleNamespace(vocab_size=10))
    run: Any = SimpleNamespace(config=SimpleNamespace(training=training), learner=learner, probe=[5, 6, 7])
    return Run._checked_state(run, SAVED | changes)


def test_what_a_run_saved_is_taken() -> None:
    assert progress().step == 4
    assert progress(probe_tokens=[]).seconds == 1.5, "an earlier version kept no tokens"


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in ("x", 4.0, -1, 7, True, None)),
        *({"seconds": value} for value in ("x", None)),
        *({"probe_tokens": value} for value in ([1, 2, 10], [1, 2, -1], [1, 2], [1, 2, "a"], "abc")),
        *({"probe_log_probs": value} for value in ([], ["x", "y"], [0.0])),
        {"skipped_in_a_row": "x"},
        {"more": 1},
    ],
    ids=repr,
)
def test_what_no_run_saves_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        progress(**changes)


@pytest.mark.parametrize(
    "then", [{"student": [1]}, {"student": None}, {"teacher": "x"}, {"software": 7}, {"prompts": {"count": 1}}]
)
def test_inputs_that_no_run_wrote_are_told(then: dict[str, Any]) -> None:
    from megatron_sead.training.inputs import _compare

    now = {"prompts": {"count": 1, "columns": {}}}
    with pytest.raises(UserError, match=r"^o: the inputs that checkpoint step-00000004 names cannot be read$"):
        _compare(SimpleNamespace(output="o"), "step-00000004", then, now, [], [])  # type: ignore[arg-type]


def test_a_terminal_that_goes_away_stops_a_run_unless_nohup_says_otherwise() -> None:
    from megatron_sead.training.interrupt import InterruptFlag

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for known in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, known)
            flag = InterruptFlag()
            flag.listen()
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (known == signal.SIG_IGN)
            if known == signal.SIG_DFL:
                signal.raise_signal(signal.SIGHUP)
                assert flag._raised
            flag.restore()
            assert signal.getsignal(signal.SIGHUP) == known
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("size", [16, 5056])
def test_generators_of_another_kind_of_device_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A GPU's state is 16 bytes, a CPU's 5,056. The host's generators go on from where they were in either case."""
    restore = import_module("megatron_sead.checkpoints.random_state")
    restored = []
    tracker = SimpleNamespace(get_states=dict, set_states=restored.append)
    monkeypatch.setattr(restore, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    state = restore.random_state() | {"device": torch.zeros(size, dtype=torch.uint8)}
    drawn = random.random(), numpy.random.rand(), torch.rand(1)
    restore.restore_random_state(state)
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == drawn
    assert len(restored) == (2 if size == 16 else 0)
