"""Check 2: our core attention without Transformer Engine, by length and by torch's backend, and packed attention."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from tests.gpu.check import CUDA, DEVICE, Report, l2, once, seconds

WINDOW, HEADS, LENGTHS = (4096, 32, (2048, 4161, 8256, 18432)) if CUDA else (24, 2, (20, 61))
PACKED = (1, 4161, 2, 2048, 2044) if CUDA else (1, 24, 5, 31)  # lengths of sequences in one row
SHARING, SHARED = 4, (8, 4160, 16, 2048, 2040) if CUDA else (8, 24, 16, 32)  # ranks, and lengths that they share
HEAD_DIM = 128
BOUND = 1e-2
COMPARED = 1  # heads that are compared with the dense reference: [s, s] in fp32 is 1.4 GB at 18,432 tokens


def attention(report: Report) -> None:
    for length in LENGTHS:
        inputs = [torch.randn(length, 1, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
        for window in (WINDOW, None):
            case, expected = f"{length} {'window' if window else 'full'}", _dense(inputs, window)
            for name, context in _backends().items():
                name = f"{case} {name}"
                report.attempt(name, partial(_ours, report, name, context, inputs, window, expected))
            name = f"{case} varlen"
            report.attempt(name, partial(_varlen, report, name, inputs, window, expected))
    inputs = [torch.randn(sum(PACKED), 1, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    for window in (WINDOW, None):
        name, expected = f"packed {'window' if window else 'full'}", _dense(inputs, window, PACKED)
        report.attempt(name, partial(_packed, report, name, inputs, window, expected))
    inputs = [torch.randn(sum(SHARED), 1, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    for window in (WINDOW, None):
        name, expected = f"shared by {SHARING} ranks, {'window' if window else 'full'}", _dense(inputs, window, SHARED)
        report.attempt(name, partial(_shared, report, name, inputs, window, expected))


def _backends() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not CUDA:
        return {"default": nullcontext}
    named = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    named["cudnn"] = SDPBackend.CUDNN_ATTENTION
    ours = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # what a run leaves on
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {"default": lambda: sdpa_kernel(ours)}
    return contexts | {name: (lambda backend=backend: sdpa_kernel([backend])) for name, backend in named.items()}


def _ours(
    report: Report,
    name: str,
    context: Callable[[], AbstractContextManager[Any]],
    inputs: list[torch.Tensor],
    window: int | None,
    expected: list[torch.Tensor],
) -> None:
    core = _core(window)
    with context():
        try:
            _measure(report, name, lambda q, k, v: core(q, k, v).unflatten(-1, (HEADS, HEAD_DIM)), inputs, expected)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            report.add(**{name: "this backend has no kernel for it"})


def _core(window: int | None) -> torch.nn.Module:
    if not CUDA:
        from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

        adapt_to_cpu()
    from megatron_sead.models.attention import TorchCoreAttention

    config: Any = SimpleNamespace(window=lambda _: window, attention_scale=lambda _: HEAD_DIM**-0.5)
    return TorchCoreAttention(config, 1)


def _packed(
    report: Report, name: str, inputs: list[torch.Tensor], window: int | None, expected: list[torch.Tensor]
) -> None:
    """Several sequences in a row, of which each sees itself alone."""
    core = _core(window)
    from megatron_sead.models.packed import PackedSequences

    starts = torch.tensor([0, *itertools.accumulate(PACKED)], dtype=torch.int32, device=DEVICE)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in PACKED])
    sequences = PackedSequences.of(starts, positions, PACKED)

    def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        context = core(query[:, 0], key[:, 0], value[:, 0], packed_seq_params=sequences)
        return context.unflatten(-1, (HEADS, HEAD_DIM))[:, None]

    _measure(report, name, packed, inputs, expected)


def _shared(
    report: Report, name: str, inputs: list[torch.Tensor], window: int | None, expected: list[torch.Tensor]
) -> None:
    """Each rank's queries in turn, of two pieces a sequence, with their own keys: FlashAttention's masks and windows
    are aligned to the lower right."""
    from megatron_sead.models import windowed
    from megatron_sead.models.zigzag import Keys, held, seen_by

    if not windowed.serves(inputs[0]):
        return
    places = [held(SHARED, rank, SHARING).to(DEVICE) for rank in range(SHARING)]
    seen = [torch.cat(seen_by(SHARED, rank, SHARING, window)).to(DEVICE) for rank in range(SHARING)]
    keys = [Keys.of(SHARED, rank, SHARING, window).to(torch.device(DEVICE)) for rank in range(SHARING)]

    def shared(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = [
            windowed.packed_attention(
                query[place, 0],
                key[of_rank, 0],
                value[of_rank, 0],
                (own.query_starts, own.key_starts),
                (max(own.query_lengths), max(own.key_lengths)),
                window,
                HEAD_DIM**-0.5,
            )
            for place, of_rank, own in zip(places, seen, keys, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()][:, None]

    _measure(report, name, shared, inputs, expected)


def _varlen(
    report: Report, name: str, inputs: list[torch.Tensor], window: int | None, expected: list[torch.Tensor]
) -> None:
    """The whole of it as one packed sequence."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        report.add(varlen="not in this torch")
        return
    parameters = inspect.signature(varlen_attn).parameters
    report.add(varlen=str(inspect.signature(varlen_attn))[:600])
    if not CUDA:
        return
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5} if "scale" in parameters else {}
    if "window_size" in parameters:
        options["window_size"] = (window - 1, 0) if window else (-1, 0)
    elif window:
        return
    else:
        options["is_causal"] = True
    length = len(inputs[0])
    ends = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)

    def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return varlen_attn(query[:, 0], key[:, 0], value[:, 0], ends, ends, length, length, **options)[:, None]

    _measure(report, name, packed, inputs, expected)


def _measure(
    report: Report,
    name: str,
    core: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    expected: list[torch.Tensor],
) -> None:
    """First and later calls, forward and backward, and errors of the output and the three gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]

    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        output = core(*leaves)
        output.backward(inputs[3])
        return output

    first = once(step)
    output = step()
    found = [output, *(leaf.grad for leaf in leaves)]
    errors = [l2(tensor[:, 0, :COMPARED].detach(), right) for tensor, right in zip(found, expected, strict=True)]
    report.add(**{f"{name} first ms": 1000 * first, f"{name} ms": 1000 * seconds(step, warm_up=1, repeats=3)})
    report.add(**{f"{name} errors": errors})
    report.expect(name, max(errors) <= BOUND, f"output and gradients within {BOUND} of dense fp32")


def _dense(inputs: list[torch.Tensor], window: int | None, lengths: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Output and gradients [s, heads compared, d] in fp32, from the whole score matrix of one head at a time.

    Args:
        lengths: of packed sequences; none: all is one.
    """
    results: list[list[torch.Tensor]] = []
    position = torch.arange(len(inputs[0]), device=DEVICE)
    hidden = position[:, None] < position
    if lengths:
        sequence = torch.cat([torch.full((length,), i, device=DEVICE) for i, length in enumerate(lengths)])
        hidden |= sequence[:, None] != sequence
    if window:
        hidden |= position[:, None] - position >= window
    for head in range(COMPARED):
        query, key, value = (tensor[:, 0, head].float().requires_grad_() for tensor in inputs[:3])
        scores = (query @ key.t() * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
        output = scores.softmax(-1) @ value
        gradients = torch.autograd.grad(output, (query, key, value), inputs[3][:, 0, head].float())
        results.append([output.detach(), *gradients])
    return [torch.stack(parts, 1) for parts in zip(*results, strict=True)]
