"""The Triton kernels against textbook formulas in fp64: run by test_triton_rows.py, in processes of their own.

On a GPU; with TRITON_INTERPRET=1, which must be set before triton is imported, on CPU tensors in its interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from megatron_sead.distillation.kernels import triton_rows
from megatron_sead.distillation.kernels.triton_rows import BLOCK, pair_sums, single_sums, write_gradient
from tests.distillation.reference import JUNK, reference, relative_error

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cpu":
    triton_rows.BLOCKS = 3  # as many seams, and less to interpret
SPAN = triton_rows.BLOCKS * BLOCK
INF = torch.inf

# An exponential's relative error is |x| * 2^-24, of the product with log2 e, and 2^-22, of the GPU's ex2: below 2e-6
# wherever it counts. Sums add 2^-24 a level of their tree. Of the sum of the terms' sizes, since E and F may cancel.
TOLERANCE = 2e-6


def logits(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 3).to(dtype).to(DEVICE)


def pair(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return logits(rows, columns, dtype, seed=1), logits(rows, columns, dtype, seed=2)


def summed(
    student: torch.Tensor, teacher: torch.Tensor, real: int | None = None, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.arange(len(student), device=DEVICE) if rows is None else rows
    real = student.shape[1] if real is None else real
    maxima, sums, columns = pair_sums(student, teacher, rows, real, with_columns=True)
    assert columns is not None
    return maxima.cpu(), sums.cpu(), columns.cpu()


def exact_terms(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[n, 6, V] in fp64: what A to F are sums of."""
    z, w = student.double().cpu(), teacher.double().cpu()
    x, y = z - z.amax(-1, keepdim=True), w - w.amax(-1, keepdim=True)
    p, q = x.exp(), y.exp()
    return torch.stack([p, q, p * x, q * y, p * (y - x), q * (y - x)], dim=1)


def check_sums(student: torch.Tensor, teacher: torch.Tensor, real: int | None = None) -> None:
    """Of logits without masks, against fp64."""
    maxima, sums, columns = summed(student, teacher, real)
    student, teacher = student[:, :real], teacher[:, :real]
    terms = exact_terms(student, teacher)
    assert maxima.dtype == sums.dtype == torch.float32 and columns.dtype == torch.int64
    for model, of in enumerate((student.cpu(), teacher.cpu())):
        assert torch.equal(maxima[:, model], of.amax(-1).float())
        assert torch.equal(columns[:, model], (of == of.amax(-1, keepdim=True)).int().argmax(-1))
    assert ((sums - terms.sum(-1)).abs() <= TOLERANCE * terms.abs().sum(-1)).all()


TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (2, BLOCK), (2, BLOCK + 1), (2, 2 * SPAN + BLOCK + 77)])
def test_sums(rows: int, columns: int, dtype: torch.dtype) -> None:
    check_sums(*pair(rows, columns, dtype))


@pytest.mark.parametrize("real", [1, BLOCK - 1, BLOCK, SPAN, SPAN + 1])
def test_padding_is_not_read(real: int) -> None:
    student, teacher = pair(2, SPAN + 40)
    student[:, real:], teacher[:, real:] = JUNK, JUNK
    check_sums(student, teacher, real)


def test_no_columns_and_no_rows() -> None:
    student, teacher = pair(3, 8)
    maxima, sums, columns = summed(student.fill_(JUNK), teacher, real=0)
    assert (maxima == -INF).all() and not sums.any() and not columns.any()
    maxima, sums, columns = summed(student[:0], teacher[:0])
    assert (maxima.shape, sums.shape, columns.shape) == ((0, 2), (0, 6), (0, 2))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "columns apart": lambda tensor: torch.stack([tensor, torch.full_like(tensor, JUNK)], -1).flatten(1)[:, ::2],
    "rows apart": lambda tensor: torch.cat([tensor, torch.full_like(tensor, JUNK)], 1)[:, : tensor.shape[1]],
    "columns first": lambda tensor: tensor.t().contiguous().t(),
    "misaligned": lambda tensor: torch.cat([tensor.new_full((1,), JUNK), tensor.flatten()])[1:].view(tensor.shape),
}


@pytest.mark.parametrize("teacher_layout", ["contiguous", "columns apart"])
@pytest.mark.parametrize("student_layout", LAYOUTS)
def test_layouts(student_layout: str, teacher_layout: str) -> None:
    student, teacher = pair(3, BLOCK + 33)
    student, teacher = LAYOUTS[student_layout](student), LAYOUTS[teacher_layout](teacher)
    check_sums(student, teacher)
    coefficients = coefficients_of(student, teacher, torch.rand(3), torch.rand(3))
    expected = exact_gradient(student, teacher, coefficients)
    out = LAYOUTS[teacher_layout](torch.empty_like(student, memory_format=torch.contiguous_format))
    write_gradient(out, student, teacher, coefficients, student.shape[1])
    assert relative_error(out.cpu(), expected) < TOLERANCE


def test_one_row_for_all() -> None:
    student, teacher = pair(3, 70)
    check_sums(student, teacher[:1].expand(3, -1))


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**25)])
def test_offsets_beyond_32_bits(strides: tuple[int, int]) -> None:
    """Products of two numbers that fit."""
    rows, columns = 3, 66
    size = (rows - 1) * strides[0] + (columns - 1) * strides[1] + 1
    # on a CPU only the pages that are touched take memory
    room = torch.empty(size, dtype=torch.bfloat16, device=DEVICE).as_strided((rows, columns), strides)
    student, teacher = pair(rows, columns, torch.bfloat16)
    coefficients = coefficients_of(student, teacher, torch.rand(rows), torch.rand(rows))
    expected = torch.empty_like(student)
    write_gradient(expected, student, teacher, coefficients, columns)
    check_sums(student, room.copy_(teacher))
    out = torch.empty_like(student)
    write_gradient(out, student, room, coefficients, columns)
    assert torch.equal(out, expected)
    check_sums(room.copy_(student), teacher)
    write_gradient(room, room, teacher, coefficients, columns)
    assert torch.equal(room, expected)


def test_chosen_rows() -> None:
    student, teacher = pair(5, 100)
    rows = torch.tensor([4, 0, 2], device=DEVICE)
    student[1], teacher[3] = JUNK, JUNK
    for result, expected in zip(summed(student, teacher, rows=rows), summed(student[rows], teacher[rows]), strict=True):
        assert torch.equal(result, expected)


def test_columns_on_request() -> None:
    student, teacher = pair(2, 100)
    rows = torch.arange(2, device=DEVICE)
    maxima, sums, columns = pair_sums(student, teacher, rows, 100, with_columns=False)
    assert columns is None
    assert torch.equal(maxima.cpu(), summed(student, teacher)[0]) and torch.equal(
        sums.cpu(), summed(student, teacher)[1]
    )


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_maxima_that_rise(offset: float) -> None:
    """From block to block and from span to span, of one model, the other, and both: all sums move each time."""
    student, teacher = pair(3, SPAN + 3 * BLOCK + 5)
    slope = torch.linspace(0, 60, student.shape[1], device=DEVICE)
    student[0] += slope
    teacher[1] += slope
    student[2], teacher[2] = student[2] + slope, teacher[2] + slope
    check_sums(student + offset, teacher - offset)


@pytest.mark.parametrize("at", [0, BLOCK + 3, SPAN + 1])
def test_one_hot(at: int) -> None:
    """One token has all the probability, in fp32: everything before it is scaled to nothing, and is not NaN."""
    student, teacher = pair(2, SPAN + BLOCK)
    student[:, at] = 1e4
    teacher[0, at] = 1e4
    check_sums(student, teacher)
    student[:, at + 1 :], student[:, :at] = -1e4, -1e4
    check_sums(student, teacher)


def test_the_lowest_of_equal_columns() -> None:
    student, teacher = pair(4, 2 * SPAN + BLOCK + 10)
    for row, where in enumerate(([3, 4], [BLOCK - 1, BLOCK], [BLOCK + 7, SPAN], [SPAN + 5, 2 * SPAN + BLOCK])):
        student[row, where] = 50.0
        teacher[row, [column + 1 for column in where]] = 50.0
    check_sums(student, teacher)
    student[:] = 0.0
    student[:, 1::2] = -0.0
    check_sums(student, -student)


def test_masked_for_both() -> None:
    """As if the token did not exist; in whole blocks, in the last one, and in a whole span."""
    student, teacher = pair(3, SPAN + 2 * BLOCK + 10)
    masked = torch.zeros_like(student, dtype=torch.bool)
    masked[0, 5:9] = True
    masked[1, :SPAN] = True
    masked[2, -BLOCK:] = True
    maxima, sums, columns = summed(student.masked_fill(masked, -INF), teacher.masked_fill(masked, -INF))
    for row in range(3):
        kept = (~masked[row]).nonzero().squeeze(1)
        expected = summed(student[row : row + 1, kept], teacher[row : row + 1, kept])
        assert torch.equal(maxima[row], expected[0][0])
        torch.testing.assert_close(sums[row], expected[1][0], rtol=2e-6, atol=0)
        assert torch.equal(kept.cpu()[expected[2][0]], columns[row])


@pytest.mark.parametrize("at", [3, BLOCK + 3, SPAN + 3])
def test_masked_for_one(at: int) -> None:
    """Possible for one model and not for the other: an infinite divergence of the right sign, the rest finite."""
    student, teacher = pair(2, SPAN + BLOCK)
    student[0, at] = -INF
    teacher[1, at] = -INF
    _, sums, _ = summed(student, teacher)
    assert sums[0, 5] == INF and sums[1, 4] == -INF
    terms = exact_terms(student, teacher).nan_to_num(0.0, 0.0, 0.0)  # 0 * inf
    terms[0, 5] = terms[1, 4] = sums[0, 5] = sums[1, 4] = 0.0  # just seen
    assert ((sums - terms.sum(-1)).abs() <= TOLERANCE * terms.abs().sum(-1)).all()


def test_an_infinite_divergence_of_nothing() -> None:
    """Beside what comes after it the token has no probability in fp32: its infinite share is zero."""
    student, teacher = pair(2, SPAN + BLOCK)
    student[0, 3] = teacher[1, 3] = -INF
    student[:, SPAN - 1], teacher[:, SPAN - 1] = 1e4, 1e4
    _, sums, _ = summed(student, teacher)
    assert sums.isfinite().all()


def test_masked_all_over() -> None:
    student, teacher = pair(3, SPAN + BLOCK)
    student[0], teacher[1], student[2], teacher[2] = -INF, -INF, -INF, -INF
    maxima, sums, columns = summed(student, teacher)
    assert maxima[0, 0] == maxima[1, 1] == -INF and (maxima[2] == -INF).all()
    assert columns[0, 0] == columns[1, 1] == 0 and not columns[2].any()
    assert not sums[0, [0, 2, 4]].any() and sums[0, 5] == INF
    assert not sums[1, [1, 3, 5]].any() and sums[1, 4] == -INF
    assert not sums[2].any()
    own = summed(teacher[:1], teacher[:1])[1]
    assert torch.equal(sums[0, [1, 3]], own[0, [1, 3]])


@pytest.mark.parametrize("value", [JUNK, INF])
@pytest.mark.parametrize("at", [0, SPAN - 1, SPAN + BLOCK + 3])
def test_a_nan_is_seen(at: int, value: float) -> None:
    """Even where a maximum elsewhere scales all that is around it to nothing."""
    student, teacher = pair(4, SPAN + BLOCK + 20)
    student[0, at], teacher[1, at] = value, value
    student[2:, BLOCK], teacher[2:, BLOCK] = 1e4, 1e4
    student[2, at], teacher[3, at] = value, value
    _, sums, _ = summed(student, teacher)
    assert sums[[0, 2], 0].isnan().all() and sums[[1, 3], 1].isnan().all()
    student[:], teacher[:] = value, value
    _, sums, columns = summed(student[:1], teacher[:1])
    assert sums.isnan().all() and not columns.any()


def test_single_sums() -> None:
    student, teacher = pair(3, BLOCK + 5)
    teacher[:, -3:] = JUNK
    maxima, sums = single_sums(teacher, BLOCK + 2)
    expected_maxima, expected, _ = summed(student, teacher, BLOCK + 2)
    assert torch.equal(maxima.cpu(), expected_maxima[:, 1:]) and torch.equal(sums.cpu(), expected[:, 1:4:2])


def coefficients_of(
    student: torch.Tensor, teacher: torch.Tensor, forward_weight: torch.Tensor, reverse_weight: torch.Tensor
) -> torch.Tensor:
    """[n, 5] as `divergence` makes them."""
    maxima, sums, _ = summed(student, teacher)
    a, b, _, _, e, _ = sums.unbind(-1)
    alpha = (forward_weight + torch.where(reverse_weight == 0, 0.0, reverse_weight * e / a)) / a
    stacked = torch.stack([alpha, -reverse_weight / a, -forward_weight / b, *maxima.unbind(-1)], -1)
    return stacked.to(DEVICE)


def exact_gradient(student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    alpha, minus_beta, minus_gamma, *maxima = coefficients.double().cpu()[:, :, None].unbind(1)
    x, y = student.double().cpu() - maxima[0], teacher.double().cpu() - maxima[1]
    return x.exp() * (alpha + minus_beta * (y - x)) + minus_gamma * y.exp()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [1, 5, triton_rows.GRADIENT_BLOCK, 2 * triton_rows.GRADIENT_BLOCK + 3])
def test_gradient(columns: int, dtype: torch.dtype) -> None:
    """From the sums to the gradient, against torch's own differentiation."""
    student, teacher = pair(4, columns, dtype)
    weights = torch.tensor([0.3, 0.0, 1.0, -0.5]), torch.tensor([0.7, 1.0, 0.0, 0.2])
    out = torch.empty_like(student)
    write_gradient(out, student, teacher, coefficients_of(student, teacher, *weights), columns)
    leaf = student.double().cpu().requires_grad_()
    reference(leaf, teacher.cpu()).loss(*weights).sum().backward()
    assert leaf.grad is not None and out.dtype == dtype
    # rounded once to the type, which the interpreter does by cutting off; of the size of the gradient's terms, which
    # cancel where one column has all the probability
    tolerance = {torch.float32: TOLERANCE, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (out.double().cpu() - leaf.grad).norm() <= tolerance * (leaf.grad.norm() + 1)


@pytest.mark.parametrize("real", [0, 1, 40, triton_rows.GRADIENT_BLOCK])
def test_gradient_over_the_logits(real: int) -> None:
    student, teacher = pair(3, triton_rows.GRADIENT_BLOCK + 40)
    coefficients = torch.tensor([[0.5, -0.3, -0.2, 9.0, 8.0]], device=DEVICE).repeat(3, 1)
    expected = exact_gradient(student, teacher, coefficients)
    expected[:, real:] = 0
    student[:, real:], teacher[:, real:] = JUNK, JUNK
    write_gradient(student, student, teacher, coefficients, real)
    assert not student[:, real:].any()
    assert real == 0 or relative_error(student.cpu()[:, :real], expected[:, :real]) < TOLERANCE


def test_rows_without_weight_are_zero() -> None:
    student, teacher = pair(3, triton_rows.GRADIENT_BLOCK + 40)
    coefficients = coefficients_of(student, teacher, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    coefficients[0, 3:] = -INF
    student[0], teacher[2], coefficients[2, 3:] = JUNK, JUNK, JUNK
    out = torch.full_like(student, JUNK)
    write_gradient(out, student, teacher, coefficients, student.shape[1] - 3)
    assert not out[[0, 2]].any()
    assert out[1].isfinite().all() and out[1, :-3].all()


def test_gradient_beside_masks() -> None:
    student, teacher = pair(3, 100)
    coefficients = torch.tensor([[0.5, -0.3, -0.2, 9.0, 8.0]], device=DEVICE).repeat(3, 1)
    coefficients[1, 1] = 0.0  # no reverse divergence: an infinite difference does not count
    coefficients[2, 2] = 0.0  # no forward divergence: nor does the teacher's probability
    expected = exact_gradient(student, teacher, coefficients)
    masked = student.clone()
    masked[:, 7] = -INF
    out = torch.empty_like(student)
    write_gradient(out, masked, teacher, coefficients, 100)
    # impossible for the student: only the teacher's term is left
    expected[:, 7] = coefficients[:, 2].cpu() * (teacher[:, 7].cpu() - 8.0).exp()
    assert relative_error(out.cpu(), expected) < TOLERANCE
    masked_teacher = teacher.clone()
    masked_teacher[1, 9] = -INF
    masked_teacher[:, 7] = -INF
    coefficients[2, 1], masked_teacher[2] = 0.0, JUNK  # no weight on either of the teacher's terms
    write_gradient(out, masked, masked_teacher, coefficients, 100)
    expected[:, 7] = 0.0
    expected[1, 9] = 0.5 * (student[1, 9].cpu().double() - 9.0).exp()
    expected[2] = 0.5 * (masked[2].cpu().double() - 9.0).exp()
    assert relative_error(out.cpu(), expected) < TOLERANCE


def test_any_one_coefficient_makes_a_gradient() -> None:
    student, teacher = pair(3, 100)
    coefficients = torch.cat([torch.diag(torch.tensor([0.5, -0.3, -0.2])), torch.tensor([[9.0, 8.0]] * 3)], 1).to(
        DEVICE
    )
    out = torch.empty_like(student)
    write_gradient(out, student, teacher, coefficients, 100)
    assert relative_error(out.cpu(), exact_gradient(student, teacher, coefficients)) < TOLERANCE
