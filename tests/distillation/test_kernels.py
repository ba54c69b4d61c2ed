"""The compiled kernels against the eager ones and fp64; when they are chosen; and that they are compiled once.

Tolerance: both add terms that are rounded to fp32.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_sead.distillation import token_statistics, vocab_parallel_entropy, weighted_divergence
from megatron_sead.distillation.kernels import compiled, eager, row_kernels
from tests.distillation.reference import JUNK, reference, relative_error

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)
COLUMNS, REAL = 5000, 4321


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as the choice of kernels goes."""
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 1)
    with torch.no_grad():
        yield


def rows_of(tokens: int, dtype: torch.dtype, columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = (torch.randn(tokens, columns) * 4).to(dtype), (torch.randn(tokens, columns) * 4).to(dtype)
    student[:, REAL:] = teacher[:, REAL:] = JUNK
    if tokens > 3:
        student[1, 5:300] = teacher[1, 5:300] = -torch.inf  # masked alike
        student[2] = student[2].sign() * 1e4  # one token has it all, or several share it
        student[3] = 2.0  # uniform
    return student, teacher


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_sums_equal_eager_ones(dtype: torch.dtype) -> None:
    student, teacher = rows_of(9, dtype)
    rows = torch.tensor([0, 1, 2, 3, 5, 8])
    assert row_kernels(student, len(rows), REAL) is compiled
    for with_columns in (False, True):
        maxima, sums, columns = compiled.pair_sums(student, teacher, rows, REAL, with_columns=with_columns)
        expected = eager.pair_sums(student.double(), teacher.double(), rows, REAL, with_columns=with_columns)
        assert torch.equal(maxima.double(), expected[0])
        torch.testing.assert_close(sums.double(), expected[1], rtol=3e-6, atol=3e-4)  # E, F: thousands cancel
        assert (columns is None) == (not with_columns)
        if columns is not None:
            assert torch.equal(columns, expected[2])
    maxima, sums = compiled.single_sums(student, REAL)
    torch.testing.assert_close(sums.double(), eager.single_sums(student.double(), REAL)[1], rtol=3e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_through_compiled_kernels(dtype: torch.dtype, in_place: bool) -> None:
    """Everything that a user calls, with padding and rows that do not teach."""
    student, teacher = rows_of(11, dtype)
    weights = torch.rand(11), torch.rand(11)
    weights[0][5], weights[1][5] = 0, 0
    student[5] = JUNK
    with torch.enable_grad():
        logits = student.clone().requires_grad_()
        loss = weighted_divergence(logits, teacher, *weights, vocab_size=REAL, reuse_student_logits=in_place)
        loss.sum().backward()
        taught = torch.arange(11) != 5
        exact_logits = student[taught, :REAL].double().masked_fill(student[taught, :REAL] == -torch.inf, -1e30)
        exact_logits.requires_grad_()
        exact_teacher = teacher[taught, :REAL].double().masked_fill(teacher[taught, :REAL] == -torch.inf, -1e30)
        exact = reference(exact_logits, exact_teacher).loss(weights[0][taught], weights[1][taught])
        exact.sum().backward()
    assert not compiled._failed
    assert relative_error(loss[taught], exact.detach()) < 2e-6
    assert relative_error(logits.grad[taught, :REAL], exact_logits.grad) < (2e-6 if dtype == torch.float32 else 2**-8)
    assert not logits.grad[:, REAL:].any() and not logits.grad[5].any()


@needs_compiler
def test_tensors_that_share_memory() -> None:
    """Logits of both models cut from one tensor, the gradient written over the student's: right, if not compiled."""
    both = torch.randn(2, 6, COLUMNS) * 3
    expected = both.clone().requires_grad_()
    weight = torch.rand(6)
    with torch.enable_grad():
        weighted_divergence(expected[0], expected[1].detach(), weight, weight).sum().backward()
        logits = (both.requires_grad_() * 1.0)[0]
        teacher = logits._base[1].detach()
        weighted_divergence(logits, teacher, weight, weight, reuse_student_logits=True).sum().backward()
    torch.testing.assert_close(logits.detach(), expected.grad[0], rtol=1e-5, atol=1e-8)
    assert not compiled._failed


@needs_compiler
@pytest.mark.parametrize("columns", [100_352, 100_278])
def test_compiled_sums_keep_their_digits_over_a_whole_vocabulary(columns: int) -> None:
    """A loop that adds 100k terms one after another loses two digits, which few columns do not show."""
    torch.manual_seed(0)
    student = torch.randn(24, columns) * 3
    teacher, weights = student + torch.randn(24, columns), (torch.rand(24), torch.rand(24))
    with torch.enable_grad():
        logits, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        loss = weighted_divergence(logits, teacher, *weights)
        loss.sum().backward()
        expected = reference(exact, teacher).loss(*weights)
        expected.sum().backward()
    assert relative_error(loss, expected.detach()) < 1e-6
    assert relative_error(logits.grad, exact.grad) < 1e-6
    entropy = vocab_parallel_entropy(student)
    assert relative_error(entropy, reference(student, teacher).student_entropy) < 1e-6


@needs_compiler
def test_no_number_of_tokens_or_columns_compiles_again() -> None:
    def everything(tokens: int, columns: int, real: int) -> None:
        student, teacher = rows_of(tokens, torch.float32, columns)
        student[:, :real], teacher[:, :real] = 1.0, 2.0
        token_statistics(student, teacher, vocab_size=real)
        vocab_parallel_entropy(student, vocab_size=real)
        weight = torch.ones(tokens)
        for reuse in (False, True):
            with torch.enable_grad():
                logits = student.clone().requires_grad_()
                loss = weighted_divergence(logits, teacher, weight, weight, vocab_size=real, reuse_student_logits=reuse)
                loss.sum().backward()

    for real in (COLUMNS, COLUMNS - 3):  # rows that follow each other, and rows with padding between them
        everything(7, COLUMNS, real)
    before = counters["stats"]["unique_graphs"]
    for tokens, columns, padding in ((2, 6000, 0), (3, 6000, 5), (64, 4998, 1), (50, 9001, 0), (1, 9000, 0)):
        everything(tokens, columns, columns - padding)
    assert counters["stats"]["unique_graphs"] == before > 0


def test_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = rows_of(4, torch.float32)
    for logits, rows in ((student.double(), 4), (student.t().contiguous().t(), 4), (student, 1)):
        assert row_kernels(logits, rows, REAL) is eager
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 4 * REAL + 1)
    assert row_kernels(student, 4, REAL) is eager


def test_without_a_compiler_eager_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise torch._inductor.exc.InductorError(RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(compiled, "_failed", False)
    for name in ("_pair_sums", "_columns", "_single_sums", "_write_gradient"):
        monkeypatch.setattr(compiled, name, fail)
    student, teacher = rows_of(4, torch.float32)
    with caplog.at_level(logging.WARNING):
        found = token_statistics(student, teacher, vocab_size=REAL)
        vocab_parallel_entropy(student, vocab_size=REAL)
    expected = token_statistics(student.double(), teacher.double(), vocab_size=REAL)
    assert relative_error(found.forward_kl, expected.forward_kl) < 1e-6
    assert [record.getMessage() for record in caplog.records if "No working C++" in record.getMessage()]
    assert len(caplog.records) == 1


class Distilled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(16, COLUMNS)

    def forward(self, hidden: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        weight = torch.ones(len(hidden))
        loss = weighted_divergence(self.head(hidden).relu(), teacher, weight, weight)
        return loss.sin().sum()


@needs_compiler
def test_a_compiled_model_may_use_the_loss() -> None:
    model, hidden, teacher = Distilled(), torch.randn(7, 16), torch.randn(7, COLUMNS)
    gradients = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        with torch.enable_grad():
            run(hidden, teacher).backward()
        gradients.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
