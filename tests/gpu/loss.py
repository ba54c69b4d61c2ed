"""Checks 3 and 4: the loss on logits and the loss fused with the heads, at OLMo-3's vocabulary."""

from __future__ import annotations

import torch

from megatron_sead.distillation import linear_weighted_divergence, weighted_divergence
from tests.distillation.reference import reference
from tests.gpu.check import CUDA, DEVICE, Report, copy_rate, l2, peak, seconds

TOKENS = 8192 if CUDA else 32
VOCABULARIES = (100352, 100278) if CUDA else (512, 501)
FUSED_TOKENS, HIDDEN = (4096, 4096) if CUDA else (64, 64)
MANY = (22528, 100352) if CUDA else (64, 512)  # tokens x vocabulary > 2^31
SEEN = 16  # rows, first and last, that are compared with fp64
FORWARD, REVERSE = 0.3, 0.7
WEIGHTS = torch.tensor(FORWARD, device=DEVICE), torch.tensor(REVERSE, device=DEVICE)


def logits_loss(report: Report) -> None:
    rate = copy_rate()
    report.add(copy_gb_per_second=rate / 1e9)
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in VOCABULARIES:
            name = f"{str(dtype)[6:]} {vocabulary}"
            report.attempt(name, lambda n=name, d=dtype, v=vocabulary: _logits(report, n, (TOKENS, v), d, rate))
    report.attempt("large", lambda: _logits(report, "bfloat16 over 2^31", MANY, torch.bfloat16, None))
    report.attempt("masked", lambda: _masked(report))
    report.attempt("nan", lambda: _nan(report))


def _pair(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits; the second has no gradient."""
    pair = [torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, 3) for _ in range(2)]
    return pair[0].requires_grad_(), pair[1]


def _logits(report: Report, name: str, shape: tuple[int, int], dtype: torch.dtype, rate: float | None) -> None:
    student, teacher = _pair(shape, dtype)

    def step() -> torch.Tensor:
        student.grad = None
        loss = weighted_divergence(student, teacher, FORWARD, REVERSE)
        loss.sum().backward()
        return loss

    loss = step()
    _compare(report, name, student, teacher, loss, 2e-6 if dtype == torch.float32 else 4e-3)
    if rate is None:
        return
    taken = seconds(step)
    moved = 5 * student.numel() * student.element_size() / taken
    report.add(**{f"{name} ms": 1000 * taken, f"{name} of copy": moved / rate})
    report.expect(f"{name} rate", moved >= 0.8 * rate or not CUDA, "at least 80 % of the copy's rate")


def _compare(
    report: Report, name: str, student: torch.Tensor, teacher: torch.Tensor, loss: torch.Tensor, bound: float
) -> None:
    """Loss and gradient of the first and last rows against textbook formulas in fp64."""
    rows = torch.cat([torch.arange(SEEN), torch.arange(len(student) - SEEN, len(student))]).to(DEVICE)
    assert student.grad is not None
    leaf = student.detach()[rows].double().requires_grad_()
    expected = reference(leaf, teacher[rows].double()).loss(*WEIGHTS)
    expected.sum().backward()
    assert leaf.grad is not None
    errors = l2(loss.detach()[rows], expected.detach()), l2(student.grad[rows], leaf.grad)
    report.add(**{f"{name} error loss": errors[0], f"{name} error gradient": errors[1]})
    report.expect(f"{name} loss", errors[0] <= 5e-6, "loss within 5e-6 of fp64")
    report.expect(f"{name} gradient", errors[1] <= bound, f"gradient within {bound} of fp64")


def _masked(report: Report) -> None:
    """Columns that are -inf in both models are as though they were not there."""
    student, teacher = _pair((64, VOCABULARIES[0]), torch.bfloat16)
    with torch.no_grad():
        student[:, 100:200], teacher[:, 100:200] = -torch.inf, -torch.inf
    loss = weighted_divergence(student, teacher, FORWARD, REVERSE)
    loss.sum().backward()
    assert student.grad is not None
    kept = torch.cat([torch.arange(100), torch.arange(200, VOCABULARIES[0])]).to(DEVICE)
    other = student.detach()[:, kept].requires_grad_()
    expected = weighted_divergence(other, teacher[:, kept], FORWARD, REVERSE)
    report.expect("masked", l2(loss.detach(), expected.detach()) <= 1e-5, "-inf columns do not count")
    report.expect("masked gradient", not student.grad[:, 100:200].any(), "-inf columns have no gradient")


def _nan(report: Report) -> None:
    student, teacher = _pair((64, VOCABULARIES[0]), torch.bfloat16)
    with torch.no_grad():
        student[63, 77] = torch.nan
    try:
        weighted_divergence(student, teacher, FORWARD, REVERSE)
    except ValueError as error:
        report.add(nan=str(error))
        report.expect("nan", True, "a NaN row raises")
    else:
        report.expect("nan", False, "a NaN row raises")


def fused_loss(report: Report) -> None:
    vocabulary = VOCABULARIES[0]
    states = [torch.randn(FUSED_TOKENS, HIDDEN, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    heads = [torch.randn(vocabulary, HIDDEN, device=DEVICE, dtype=torch.bfloat16).mul_(0.02) for _ in range(2)]
    for head in heads:
        head[VOCABULARIES[1] :] = torch.nan  # padding may hold anything
    states[0].requires_grad_(), heads[0].requires_grad_()
    alone: list[float] = []
    report.attempt("products", lambda: alone.append(_products(report, states, heads)))
    for scratch in (2**28, 2**30, 2**32) if CUDA else (2**18,):
        report.attempt(f"scratch {scratch >> 20} MiB", lambda s=scratch: _fused(report, s, states, heads, alone))


def _products(report: Report, states: list[torch.Tensor], heads: list[torch.Tensor]) -> float:
    """Seconds of the four matrix products, each of all tokens at once, bf16 into bf16."""
    hidden, head = states[0].detach(), heads[0].detach()
    gradient = torch.randn(len(hidden), len(head), device=DEVICE, dtype=torch.bfloat16)
    forward = seconds(lambda: hidden @ head.t())
    of_hidden = seconds(lambda: gradient @ head)
    of_head = seconds(lambda: gradient.t() @ hidden)
    total = 2 * forward + of_hidden + of_head
    flops = 4 * 2 * gradient.numel() * hidden.shape[1]
    report.add(products_ms=[1000 * t for t in (forward, of_hidden, of_head)], products_tflops=flops / total / 1e12)
    if CUDA:
        wide = seconds(lambda: torch.mm(hidden, head.t(), out_dtype=torch.float32))
        wide_head = seconds(lambda: torch.mm(gradient.t(), hidden, out_dtype=torch.float32))
        report.add(products_into_fp32_ms=[1000 * wide, 1000 * wide_head])
    return total


def _fused(
    report: Report, scratch: int, states: list[torch.Tensor], heads: list[torch.Tensor], alone: list[float]
) -> None:
    def step() -> None:
        states[0].grad = heads[0].grad = None
        loss = linear_weighted_divergence(
            states[0],
            heads[0],
            states[1],
            heads[1],
            FORWARD,
            REVERSE,
            vocab_size=VOCABULARIES[1],
            scratch_bytes=scratch,
        )
        loss.sum().backward()

    name = f"scratch {scratch >> 20} MiB"
    step()
    states[0].grad = heads[0].grad = None
    bytes_needed = peak(step)
    taken = seconds(step, warm_up=1, repeats=3)
    report.add(**{f"{name} ms": 1000 * taken, f"{name} peak GiB": bytes_needed / 2**30})
    if alone:
        report.add(**{f"{name} of the products": taken / alone[0]})
        report.expect(name, taken <= 1.33 * alone[0] or not CUDA, "at most 1.33 times the products alone")
    if scratch == (2**28 if CUDA else 2**18):
        report.attempt("fused error", lambda: _fused_error(report, states, heads))


def _fused_error(report: Report, states: list[torch.Tensor], heads: list[torch.Tensor]) -> None:
    """The hidden gradient and loss of some tokens against fp64."""
    rows, vocabulary = slice(0, SEEN), VOCABULARIES[1]
    leaf = states[0].detach().double()[rows].requires_grad_()
    logits = leaf @ heads[0].detach()[:vocabulary].double().t()
    expected = reference(logits, states[1][rows].double() @ heads[1][:vocabulary].double().t()).loss(*WEIGHTS)
    expected.sum().backward()
    assert states[0].grad is not None and leaf.grad is not None
    error = l2(states[0].grad[rows], leaf.grad)
    report.add(fused_error_hidden_gradient=error)
    report.expect("fused gradient", error <= 1e-2, "the hidden states' gradient within 1e-2 of fp64")
    head = heads[0].grad
    assert head is not None
    report.expect("padding", not head[vocabulary:].any(), "padding has no gradient, though it holds NaN")
    with torch.no_grad():
        of_logits, taught = (s.float() @ h[:vocabulary].float().t() for s, h in zip(states, heads, strict=True))
    weighted_divergence(of_logits.requires_grad_(), taught, FORWARD, REVERSE).sum().backward()
    assert of_logits.grad is not None
    error = l2(head[rows], of_logits.grad[:, rows].t() @ states[0].detach().float())
    report.add(fused_error_head_gradient=error)
    report.expect("fused head", error <= 1e-2, "the head's gradient within 1e-2 of the loss on fp32 logits")
