"""Did two runs train alike: their metrics, zones and the students that they exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launching import ROOT, metrics_of, zones_of

BOUND = 1e-5
OF_MOVEMENT = 1e-3

RELATIVE = ("loss", "student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")
EQUAL = ("response_tokens", "active_tokens", "eligible_prompts", "pass_rate", "alpha", "learning_rate")


def assert_same_run(expected: Path, found: Path, norm_bound: float = BOUND) -> None:
    """Two whole run directories, of the same steps on the same rollouts."""
    theirs, ours = metrics_of(expected), metrics_of(found)
    assert len(ours) == len(theirs)
    for step, (before, after) in enumerate(zip(theirs, ours, strict=True)):
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=norm_bound), step
        for key in RELATIVE:
            assert after[key] == pytest.approx(before[key], rel=BOUND), (step, key)
        for key in EQUAL:
            assert after[key] == before[key], (step, key)
        assert zones_of(found, step) == zones_of(expected, step), step
    for name, (of_weights, of_movement) in weights_apart(expected, found).items():
        assert of_weights <= BOUND, name
        assert of_movement <= OF_MOVEMENT, name


def weights_apart(expected: Path, found: Path) -> dict[str, tuple[float, float]]:
    """How far the exported students' tensors are apart: over a tensor's norm, and over how far training moved it."""
    folders = ROOT / "examples" / "tiny" / "student", expected / "student-hf", found / "student-hf"
    start, theirs, ours = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() == start.keys()
    apart = {}
    for name, weights in theirs.items():
        difference, moved = _norm(ours[name], weights), _norm(weights, start[name])
        apart[name] = difference / float(weights.double().norm()), difference / moved
    return apart


def _norm(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm())
