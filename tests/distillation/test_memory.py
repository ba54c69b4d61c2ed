"""Memory beyond the inputs, as the operating system counts it, in units of one fp32 [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sead.distillation import (
    linear_token_scores,
    linear_weighted_divergence,
    token_statistics,
    vocab_parallel_entropy,
    weighted_divergence,
)

TOKENS, COLUMNS, HIDDEN = 256, 65_536, 16
UNIT = TOKENS * COLUMNS * 4


def peak_growth(function: Callable[[], object]) -> float:
    """Units by which the process outgrows itself while the function runs."""
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("needs Linux's /proc/self/clear_refs, to measure peak memory")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / UNIT


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    token_statistics(torch.randn(2, 300), torch.randn(2, 300))  # code that is paged in counts as memory too
    return torch.randn(TOKENS, COLUMNS), torch.randn(TOKENS, COLUMNS)


def test_a_whole_tensor_is_seen(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert peak_growth(lambda: logits[0] + 1.0) > 0.9


def test_statistics(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert peak_growth(lambda: token_statistics(*logits)) < 0.1
    assert peak_growth(lambda: vocab_parallel_entropy(logits[0])) < 0.1


@pytest.mark.parametrize(("reuse", "limit"), [(True, 0.1), (False, 1.1)])
def test_loss_on_logits(logits: tuple[torch.Tensor, torch.Tensor], reuse: bool, limit: float) -> None:
    student = logits[0].clone().requires_grad_()
    weights = torch.rand(TOKENS), torch.rand(TOKENS)

    def train() -> None:
        weighted_divergence(student, logits[1], *weights, reuse_student_logits=reuse).sum().backward()

    assert peak_growth(train) < limit  # without reuse the gradient is one unit


def test_fused_loss_and_scores() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(COLUMNS, HIDDEN, requires_grad=True)
    weights = torch.rand(TOKENS), torch.rand(TOKENS)
    scratch_bytes = UNIT // 8
    # the head's gradient is 1/16 of a unit, and its product with a chunk as much again
    train = peak_growth(
        lambda: (
            linear_weighted_divergence(hidden, head, hidden, head, *weights, scratch_bytes=scratch_bytes)
            .sum()
            .backward()
        )
    )
    assert train < 0.35
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    score = peak_growth(
        lambda: linear_token_scores(
            hidden,
            head,
            hidden,
            head,
            targets,
            student_stop_token_ids=(1,),
            teacher_stop_token_ids=(2,),
            scratch_bytes=scratch_bytes,
        )
    )
    assert score < 0.25
