"""The kernels in C++ against the eager ones and fp64; when they are chosen; and that they are compiled once.

Tolerance: both add terms that are rounded to fp32.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_sead.distillation import token_statistics, vocab_parallel_entropy, weighted_divergence
from megatron_sead.distillation.kernels import compiled, eager, row_kernels
from tests.distillation.reference import JUNK, reference, relative_error

needs_compiler = pytest.mark.skipif(
    "CXX" not in os.environ and not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C++ compiler"
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
    assert row_kernels(len(rows), REAL, student, teacher) is compiled
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
@pytest.mark.parametrize("dtype", list(compiled.TYPES))
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
    assert relative_error(loss[taught], exact.detach()) < 2e-6
    rounding = max(2e-6, torch.finfo(dtype).eps)
    assert relative_error(logits.grad[taught, :REAL], exact_logits.grad) < rounding
    assert not logits.grad[:, REAL:].any() and not logits.grad[5].any()


@needs_compiler
def test_tensors_that_share_memory() -> None:
    """Logits of both models cut from one tensor, the gradient written over the student's: right all the same."""
    both = torch.randn(2, 6, COLUMNS) * 3
    expected = both.clone().requires_grad_()
    weight = torch.rand(6)
    with torch.enable_grad():
        weighted_divergence(expected[0], expected[1].detach(), weight, weight).sum().backward()
        logits = (both.requires_grad_() * 1.0)[0]
        teacher = logits._base[1].detach()
        weighted_divergence(logits, teacher, weight, weight, reuse_student_logits=True).sum().backward()
    torch.testing.assert_close(logits.detach(), expected.grad[0], rtol=1e-5, atol=1e-8)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16).to(torch.uint16).view(dtype)
    read, _ = compiled.single_sums(numbers[:, None], 1)  # the maximum of a row of one
    isnan = numbers.isnan()
    assert torch.equal(read[~isnan, 0], numbers[~isnan].float())

    exact = numbers[~isnan].float()
    between = torch.cat([exact, exact[:-1] + exact.diff() / 2])  # and the ties between neighbours
    special = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # kinds of NaN
    near = torch.cat([between, between.nextafter(torch.tensor(torch.inf)), special, torch.tensor([1e38, -1e38])])
    written = torch.empty(len(near), 1, dtype=dtype)
    zero, none = torch.zeros(len(near), 1, dtype=dtype), torch.zeros(len(near))
    compiled.write_gradient(written, zero, zero, torch.stack([near, none, none, none, none], dim=1), 1)  # alpha * e^0
    assert torch.equal(written[:, 0].isnan(), near.isnan())
    assert torch.equal(written[~near.isnan(), 0], near[~near.isnan()].to(dtype))


@needs_compiler
def test_exponentials_are_exact_to_the_last_place_but_one() -> None:
    """Measured: 0.72 of 2^-23, with AVX-512. Below the least normal number they are below it too, and soon zero."""
    least = math.log(torch.finfo(torch.float32).tiny)
    x = torch.cat([torch.linspace(least - 20, 0, 2**20), -torch.logspace(-30, 2, 2**16), torch.tensor([-torch.inf])])
    x = x[None]
    alpha = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    found, unused = torch.empty_like(x), torch.zeros_like(x)
    compiled.write_gradient(found, x, unused, alpha, x.shape[1])
    expected = x.double().exp()
    normal = x > least + 1e-5
    assert ((found.double() - expected)[normal] / expected[normal]).abs().max() < 0.8 * 2**-23
    assert found[~normal].max() < 1.001 * torch.finfo(torch.float32).tiny
    assert not found[x <= -88].any()


@needs_compiler
@pytest.mark.parametrize("dtype", list(compiled.TYPES))
def test_nan_and_infinity_mean_what_they_do_in_torch(dtype: torch.dtype) -> None:
    """Wherever in a row: first block, last block, among the columns that fill no vector."""
    student, teacher = (torch.randn(12, REAL).to(dtype) for _ in range(2))
    student[0, 3] = teacher[1, REAL - 1] = student[2, 1000] = torch.nan
    student[3, 7], teacher[4, REAL - 2] = torch.inf, torch.inf
    student[5], teacher[6] = -torch.inf, -torch.inf
    teacher[7, 100] = -torch.inf  # impossible for one model only: divergences are infinite
    student[8, : REAL - 1] = teacher[8, : REAL - 1] = -torch.inf
    student[9, :600], teacher[10, :600] = -torch.inf, -torch.inf  # the maximum of one model moves from -inf
    student[11, 600], teacher[11, 900] = 1e4, 2e4  # nothing is left of what came before,
    teacher[11, 3] = -torch.inf  # infinite or not
    rows = torch.arange(12)
    _, sums, _ = compiled.pair_sums(student, teacher, rows, REAL, with_columns=False)
    _, expected, _ = eager.pair_sums(student, teacher, rows, REAL)
    torch.testing.assert_close(sums, expected, rtol=3e-6, atol=3e-4, equal_nan=True)
    _, single = compiled.single_sums(student, REAL)
    torch.testing.assert_close(single, eager.single_sums(student, REAL)[1], rtol=3e-6, atol=3e-4, equal_nan=True)
    for weights in ((0.3, 0.7, 0.5), (0.3, 0.0, 0.5), (0.3, 0.7, 0.0), (0.0, 0.0, 0.0)):
        coefficients = torch.tensor([*weights, 2.0, 2.0]).repeat(12, 1)
        found, expected = torch.empty_like(student), torch.empty_like(student)
        compiled.write_gradient(found, student.clamp(max=2), teacher.clamp(max=2), coefficients, REAL)
        eager.write_gradient(expected, student.clamp(max=2), teacher.clamp(max=2), coefficients, REAL)
        rounding = max(3e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-7, equal_nan=True)


@needs_compiler
def test_rows_are_chosen_and_strided() -> None:
    """Rows in any order, cut from wider ones, of which nothing else is touched."""
    wide = [torch.randn(6, COLUMNS + more) for more in range(3)]
    student, teacher, out = (part[::2, 10 : 10 + REAL] for part in wide)
    rows = torch.tensor([2, 0])
    maxima, sums, _ = compiled.pair_sums(student, teacher, rows, REAL - 1, with_columns=False)
    expected = eager.pair_sums(student, teacher, rows, REAL - 1)
    assert torch.equal(maxima, expected[0])
    torch.testing.assert_close(sums, expected[1], rtol=3e-6, atol=3e-4)
    before, coefficients = wide[2].clone(), torch.rand(3, 5)
    compiled.write_gradient(out, student, teacher, coefficients, REAL - 1)
    eager.write_gradient(before[::2, 10 : 10 + REAL], student, teacher, coefficients, REAL - 1)
    torch.testing.assert_close(wide[2], before, rtol=1e-5, atol=1e-7)


@needs_compiler
def test_no_number_of_tokens_or_columns_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(compiled.subprocess, "run", lambda command, **how: runs.append(command) or run(command, **how))
    compiled._library.cache_clear()
    for dtype in compiled.TYPES:
        for tokens, columns, padding in ((7, 5000, 0), (2, 6000, 0), (3, 6000, 5), (64, 4998, 1), (1, 9000, 0)):
            student, teacher = rows_of(tokens, dtype, columns)
            student[:, : columns - padding], teacher[:, : columns - padding] = 1.0, 2.0
            token_statistics(student, teacher, vocab_size=columns - padding)
            vocab_parallel_entropy(student, vocab_size=columns - padding)
            with torch.enable_grad():
                logits, weight = student.requires_grad_(), torch.ones(tokens)
                weighted_divergence(logits, teacher, weight, weight, vocab_size=columns - padding).sum().backward()
    assert len(runs) == 1


@needs_compiler
def test_defaults_of_the_process_do_not_matter() -> None:
    student, teacher = rows_of(4, torch.float32)
    expected = token_statistics(student, teacher, vocab_size=REAL)
    torch.set_default_dtype(torch.float64)
    try:
        found = token_statistics(student, teacher, vocab_size=REAL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.forward_kl, expected.forward_kl)


class OfAnotherKind(torch.Tensor):
    """As DTensor is."""


def test_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = rows_of(4, torch.float32)
    across = student.t().contiguous().t()
    types, layouts = (
        ((student.double(), teacher.double()), (student, teacher.half())),
        ((across, teacher), (student, across)),
    )
    for logits in (*types, *layouts, (student.as_subclass(OfAnotherKind), teacher)):
        assert row_kernels(4, REAL, *logits) is eager
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 4 * REAL + 1)
    assert row_kernels(4, REAL, student, teacher) is eager


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "none of g++, clang++, c++ is installed"),
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("g++ 'with no end", "No closing quotation"),
        ("false", "false: "),
        ("true", "rows.so: cannot open shared object file"),
    ],
)
def test_without_a_compiler_eager_serves_and_says_so(
    compiler: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", compiler)
    compiled._library.cache_clear()
    student, teacher = rows_of(4, torch.float32)
    try:
        with caplog.at_level(logging.WARNING):
            found = token_statistics(student, teacher, vocab_size=REAL)
            vocab_parallel_entropy(student, vocab_size=REAL)
    finally:
        compiled._library.cache_clear()
    expected = token_statistics(student.double(), teacher.double(), vocab_size=REAL)
    assert relative_error(found.forward_kl, expected.forward_kl) < 1e-6
    assert [reason in record.getMessage() for record in caplog.records] == [True]  # once


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
