"""The losses on one process: memory, reuse, types, masks of weights, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.distillation import linear_divergence, linear_weighted_divergence, weighted_divergence
from megatron_sead.distillation.kernels import eager, formulas
from tests.distillation.reference import reference, relative_error


def pair(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (torch.randn(tokens, columns) * 3).to(dtype), (torch.randn(tokens, columns) * 3).to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    columns=st.integers(1, 400),
    forward=st.sampled_from([0.0, 1.0, 0.3, -2.0]),
    reverse=st.sampled_from([0.0, 1.0, 0.7, -0.5]),
)
def test_gradient_is_that_of_the_loss(seed: int, columns: int, forward: float, reverse: float) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(3, columns) * 4, torch.randn(3, columns) * 4
    weights = torch.full((3,), forward), torch.full((3,), reverse)
    logits, expected = student.clone().requires_grad_(), student.double().requires_grad_()
    weighted_divergence(logits, teacher, *weights).sum().backward()
    reference(expected, teacher).loss(*weights).sum().backward()
    # of the size of its terms, which nearly cancel where one token has all the probability: fp32 knows no better
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    terms = abs(forward) + abs(reverse) * (log_p.exp() * (log_p - log_q)).norm()
    assert (logits.grad.double() - expected.grad).norm() <= 2e-6 * (expected.grad.norm() + terms)
    # one constant more or less in the logits is the same distribution
    assert logits.grad.sum(-1).abs().max() < 2e-6 * (1 + terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_of_logits(dtype: torch.dtype) -> None:
    student, teacher = pair(6, 500, dtype)
    weights = torch.rand(6), torch.rand(6)
    logits, expected = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = weighted_divergence(logits, teacher, *weights)
    loss.sum().backward()
    exact = reference(expected, teacher).loss(*weights)
    exact.sum().backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert relative_error(loss.detach(), exact.detach()) < 1e-6
    # the gradient is rounded once, to the logits' type
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert relative_error(logits.grad, expected.grad) < tolerance


def test_reused_logits_hold_the_gradient_once() -> None:
    student, teacher = pair(4, 60)
    weights = torch.rand(4), torch.rand(4)
    kept = student.clone().requires_grad_()
    weighted_divergence(kept, teacher, *weights).sum().backward()
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    loss = weighted_divergence(logits, teacher, *weights, reuse_student_logits=True).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, kept.grad) and torch.equal(logits.detach(), kept.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reuse", [False, True])
def test_transposed_logits(reuse: bool) -> None:
    student, teacher = (part.view(2, 3, 60) for part in pair(6, 60))
    weights = torch.rand(2, 3), torch.rand(2, 3)
    expected, logits = student.clone().requires_grad_(), student.clone().requires_grad_()
    weighted_divergence(expected, teacher, *weights).sum().backward()
    weighted_divergence(
        (logits * 1.0).transpose(0, 1),
        teacher.transpose(0, 1),
        *(weight.t() for weight in weights),
        reuse_student_logits=reuse,
    ).sum().backward()
    assert torch.equal(logits.grad, expected.grad)


def test_tokens_without_weight_may_hold_anything() -> None:
    student, teacher = pair(4, 60)
    student[1], teacher[2] = torch.nan, torch.inf
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0])
    logits = student.requires_grad_()
    loss = weighted_divergence(logits, teacher, weight, weight)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert not loss[1:3].any() and not logits.grad[1:3].any() and logits.grad[[0, 3]].any(-1).all()


def test_tokens_without_weight_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = formulas.pair_sums
    monkeypatch.setattr(formulas, "pair_sums", lambda z, w: (read.append(len(z)), real(z, w))[1])
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 1)
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0])
    weighted_divergence(*pair(4, 60), weight, torch.zeros(4))
    assert read == [1, 1]


def test_nan_is_refused_where_a_token_has_a_weight() -> None:
    student, teacher = pair(4, 60)
    student[2, 5] = torch.nan
    weight = torch.ones(4)
    with pytest.raises(ValueError, match="student logits of token 2 \\(of 4\\) are NaN"):
        weighted_divergence(student, teacher, weight, weight)
    arguments = fused_arguments()
    arguments["teacher_hidden"][7] = torch.nan
    with pytest.raises(ValueError, match="teacher logits of token 7 \\(of 9\\) are NaN"):
        linear_weighted_divergence(**arguments)
    weight[1] = torch.nan
    with pytest.raises(ValueError, match=r"token 1 .* a weight is NaN"):
        weighted_divergence(teacher, teacher, weight, weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_gradient_goes_to_main_grad_unrounded(dtype: torch.dtype, tied: bool) -> None:
    arguments = fused_arguments()
    for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head"):
        arguments[name] = arguments[name].to(dtype)
    exact = fused_gradients({name: tensor.double() for name, tensor in arguments.items()})[2]
    head = torch.nn.Parameter(arguments["student_head"])
    head.main_grad = torch.ones_like(head, dtype=torch.float32)
    head.grad_added_to_main_grad = False
    if tied:
        head.zero_out_wgrad = True
    arguments["student_head"] = head
    (2 * linear_weighted_divergence(**arguments)).sum().backward()
    assert head.grad_added_to_main_grad and head.grad.dtype == dtype  # which Megatron ignores, or adds
    assert not tied or not head.grad.any()
    assert relative_error(head.main_grad - 1, 2 * exact) < 3e-6


def fused_arguments(tokens: int = 9, columns: int = 130) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "student_hidden": torch.randn(tokens, 16),
        "student_head": torch.randn(columns, 16) * 0.7,
        "teacher_hidden": torch.randn(tokens, 24),
        "teacher_head": torch.randn(columns, 24) * 0.6,
        "forward_weight": torch.rand(tokens),
        "reverse_weight": torch.rand(tokens),
    }


def fused_gradients(arguments: dict[str, Any], upstream: torch.Tensor | None = None, **options: Any) -> list[Any]:
    hidden = arguments["student_hidden"].clone().requires_grad_()
    head = arguments["student_head"].clone().requires_grad_()
    loss = linear_weighted_divergence(**(arguments | {"student_hidden": hidden, "student_head": head}), **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return [loss.detach(), hidden.grad, head.grad]


@settings(max_examples=20, deadline=None)
@given(scratch_bytes=st.integers(1, 30_000), teaching=st.lists(st.booleans(), min_size=9, max_size=9))
def test_fused_loss_does_not_depend_on_the_chunks(scratch_bytes: int, teaching: list[bool]) -> None:
    arguments = fused_arguments()
    for name in ("forward_weight", "reverse_weight"):
        arguments[name] = arguments[name] * torch.tensor(teaching)
    student = arguments["student_hidden"].double().requires_grad_()
    head = arguments["student_head"].double().requires_grad_()
    teacher = arguments["teacher_hidden"].double() @ arguments["teacher_head"].double().t()
    exact = reference(student @ head.t(), teacher).loss(arguments["forward_weight"], arguments["reverse_weight"])
    exact.sum().backward()
    for found, expected in zip(
        fused_gradients(arguments, scratch_bytes=scratch_bytes), (exact.detach(), student.grad, head.grad), strict=True
    ):
        assert (found.double() - expected).norm() <= 1e-5 * expected.norm()  # of one token, terms nearly cancel


def test_fused_loss_leaves_out_tokens_without_weight() -> None:
    arguments = fused_arguments()
    arguments["forward_weight"][3:] = arguments["reverse_weight"][3:] = 0
    for name in ("student_hidden", "teacher_hidden"):
        arguments[name][3:] = torch.nan
    loss, hidden, head = fused_gradients(arguments)
    assert loss[:3].all() and hidden[:3].any(-1).all() and head.isfinite().all()
    assert not loss[3:].any() and not hidden[3:].any()


def test_fused_gradients_again_and_accumulated() -> None:
    arguments = fused_arguments()
    _, *once = fused_gradients(arguments)
    arguments["student_hidden"].requires_grad_()
    arguments["student_head"].requires_grad_()
    loss = linear_weighted_divergence(**arguments).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip((arguments["student_hidden"], arguments["student_head"]), once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_wanted_are_formed(wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []

    def record(name: str) -> Callable[..., Any]:
        real = getattr(linear_divergence, name)
        return lambda *inputs, **options: (formed.append(name), real(*inputs, **options))[1]

    for name in ("hidden_gradient", "add_head_gradient"):
        monkeypatch.setattr(linear_divergence, name, record(name))
    arguments = fused_arguments()
    expected = fused_gradients(arguments)
    formed.clear()
    arguments["student_hidden"].requires_grad_(wanted[0])
    arguments["student_head"].requires_grad_(wanted[1])
    loss = linear_weighted_divergence(**arguments)
    assert formed == [name for name, want in zip(("hidden_gradient", "add_head_gradient"), wanted, strict=True) if want]
    assert torch.equal(loss, expected[0]) and loss.requires_grad == any(wanted)
    with torch.no_grad():
        formed.clear()
        linear_weighted_divergence(**arguments)
    assert not formed


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_fused_loss_in_bf16(hidden_dtype: torch.dtype) -> None:
    """Logits and sums are fp32, so only the inputs' own rounding is left, and one of each gradient."""
    arguments = fused_arguments(columns=5000)  # more than a tile of head rows
    rounded = {name: arguments[name].bfloat16() for name in ("student_hidden", "student_head")}
    rounded |= {name: arguments[name].bfloat16() for name in ("teacher_hidden", "teacher_head")}
    for name in ("student_hidden", "teacher_hidden"):
        rounded[name] = rounded[name].to(hidden_dtype)
    exact = {name: tensor.double() for name, tensor in (arguments | rounded).items()}
    loss, hidden, head = fused_gradients(arguments | rounded)
    exact_loss, exact_hidden, exact_head = fused_gradients(exact)
    assert loss.dtype == torch.float32 and hidden.dtype == hidden_dtype and head.dtype == torch.bfloat16
    assert relative_error(loss, exact_loss) < 2e-6
    assert relative_error(hidden, exact_hidden) < (3e-6 if hidden_dtype == torch.float32 else 2**-8)
    assert relative_error(head, exact_head) < 2**-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward_weight": torch.zeros(8)}, "forward_weight is [8]"),
        ({"reverse_weight": torch.zeros(9, 1)}, "reverse_weight is [9, 1]"),
        ({"student_hidden": torch.zeros(9, 17)}, "student_hidden is [9, 17]"),
        ({"teacher_hidden": torch.zeros(8, 24)}, "same tokens"),
        ({"teacher_head": torch.zeros(131, 24)}, "teacher_head has 131 columns"),
        ({"student_head": torch.zeros(130, 16, device="meta")}, "same device"),
        ({"student_head": torch.zeros(130, 16, dtype=torch.int64)}, "floating point"),
        ({"vocab_size": 131}, "vocab_size=131: must be from 1 to 130"),
        ({"scratch_bytes": 0}, "scratch_bytes=0"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        linear_weighted_divergence(**(fused_arguments() | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["forward_weight", "reverse_weight"])
def test_weights_must_be_one_a_token(name: str) -> None:
    weights = {"forward_weight": torch.ones(4), "reverse_weight": torch.ones(4)} | {name: torch.ones(1)}
    with pytest.raises(ValueError, match=name):
        weighted_divergence(*pair(4, 10), **weights)
