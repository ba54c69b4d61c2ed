"""Did two runs train alike: their metrics, zones and the students that they exported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launching import ROOT, metrics_of, zones_of

BOUND = 1e-5
# Of a single step's gradient norm, whose root mean square over the steps is held to BOUND. Rounding does more to some
# steps than to others: with weights moved by 1e-7 of themselves, their last bit, one rank's own norm changed by 1e-6 in
# most of ten steps, and by 8e-6 to 1.3e-5 in one
NORM_BOUND = 2e-5
OF_MOVEMENT = 1e-3

RELATIVE = ("loss", "student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")
EQUAL = ("response_tokens", "active_tokens", "eligible_prompts", "pass_rate", "alpha", "learning_rate")


def assert_same_run(expected: Path, found: Path) -> None:
    """Two whole run directories, of the same steps on the same rollouts."""
    theirs, ours = metrics_of(expected), metrics_of(found)
    assert len(ours) == len(theirs)
    errors = list[float]()
    for step, (before, after) in enumerate(zip(theirs, ours, strict=True)):
        for key in ("grad_norm", *RELATIVE):
            near = pytest.approx(before[key], rel=NORM_BOUND if key == "grad_norm" else BOUND)
            assert after[key] == near, f"step {step}, {key}: {after[key]!r}, not {near}"
        errors.append(after["grad_norm"] / before["grad_norm"] - 1 if before["grad_norm"] else 0.0)
        for key in EQUAL:
            assert after[key] == before[key], f"step {step}, {key}: {after[key]!r}, not {before[key]!r}"
        assert zones_of(found, step) == zones_of(expected, step), f"step {step}: the zones differ"
    assert math.hypot(*errors) <= BOUND * math.sqrt(len(errors)), f"gradient norms are off by {errors}"
    for name, (of_weights, of_movement) in weights_apart(expected, found).items():
        off = f"{name} is off by {of_weights:.1e} of its norm, {of_movement:.1e} of the way that training moved it"
        assert of_weights <= BOUND and of_movement <= OF_MOVEMENT, off


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
