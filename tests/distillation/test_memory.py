"""Memory beyond the inputs, as the operating system counts it, in units of one fp32 [tokens, vocabulary] tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sead.distillation import (
    linear_token_scores,
    linear_weighted_divergence,
    scratch,
    token_statistics,
    vocab_parallel_entropy,
    weighted_divergence,
)

TOKENS, COLUMNS, HIDDEN = 256, 65_536, 16
UNIT = TOKENS * COLUMNS * 4


def peak_growth(function: Callable[[], object]) -> float:
    """Units by which the process outgrows itself while the function runs."""
    scratch.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory that was freed and is kept for reuse would hide growth
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
    pair = torch.randn(TOKENS, COLUMNS), torch.randn(TOKENS, COLUMNS)
    # code that is compiled and paged in counts as memory too
    token_statistics(*pair)
    vocab_parallel_entropy(pair[0])
    student, weight = pair[0].clone().requires_grad_(), torch.ones(TOKENS)
    for reuse in (False, True):
        weighted_divergence(student, pair[1], weight, weight, reuse_student_logits=reuse).sum().backward()
    return pair


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
    # the head's gradient is 1/16 of a unit, chunks 1/8, and the matrix library's own buffers about as much again

    def train() -> None:
        loss = linear_weighted_divergence(hidden, head, hidden, head, *weights, scratch_bytes=scratch_bytes)
        loss.sum().backward()

    def score() -> None:
        stops = {"student_stop_token_ids": (1,), "teacher_stop_token_ids": (2,)}
        linear_token_scores(hidden, head, hidden, head, targets, **stops, scratch_bytes=scratch_bytes)

    targets = torch.zeros(TOKENS, dtype=torch.int64)
    train(), score()  # compile
    # The least of a few: pages that the system puts together meanwhile count, too, and come once
    assert min(peak_growth(train) for _ in range(3)) < 0.45
    assert min(peak_growth(score) for _ in range(3)) < 0.45


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scratch_does_not_grow_with_tokens(share: float) -> None:
    """Seven units more of each model's logits, if it did. Of the hidden states' gradient there is a little more."""
    torch.manual_seed(0)
    head = torch.randn(COLUMNS, HIDDEN, requires_grad=True)

    def peak(tokens: int) -> float:
        hidden, weights = torch.randn(tokens, HIDDEN, requires_grad=True), (torch.rand(tokens) < share).float()

        def train() -> None:
            loss = linear_weighted_divergence(hidden, head, hidden, head, weights, weights, scratch_bytes=UNIT // 8)
            loss.sum().backward()

        train()
        return peak_growth(train)

    assert peak(8 * TOKENS) < peak(TOKENS) + 0.2
