"""The rotation of queries and keys: as written out with autograd, and with little kept for its backward pass."""

from __future__ import annotations

import pytest
import torch

from megatron_sead.models.rotary import _turned, rotate

# Shapes: s sequence, b batch, n heads, d head dimension


def written_out(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """With cosines and sines of every dimension, which autograd differentiates."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * angles.cos() + turned * angles.sin()).to(x.dtype)


def angles_of(s: int, d: int) -> torch.Tensor:
    """[s, 1, 1, d], the last ones many turns."""
    half = torch.arange(s)[:, None] * torch.logspace(0, -3, d // 2)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def queries(dtype: torch.dtype, s: int = 37, b: int = 2, n: int = 3, d: int = 16) -> torch.Tensor:
    """[s, b, n, d], as they lie in a projection beside keys and values."""
    mixed = torch.randn(s, b, n + 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mixed.to(dtype)[:, :, :n].requires_grad_()


def both(x: torch.Tensor, angles: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Result and gradient of ours, then of the form that is written out."""
    results: list[torch.Tensor] = []
    for form in (rotate, written_out):
        found = form(x, angles)
        results += [found.detach(), *torch.autograd.grad(found, x, upstream)]
    return tuple(results)


def test_in_fp64_it_is_the_written_out_form_and_so_is_its_gradient() -> None:
    x, angles = queries(torch.float64, s=7), angles_of(7, 16)
    ours, gradient, theirs, expected = both(x, angles, torch.randn_like(x))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda q: rotate(q, angles), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_once(dtype: torch.dtype) -> None:
    """The result is the written-out form's, bit for bit; its gradient fp64's, rounded where autograd rounds more."""
    x, angles = queries(dtype), angles_of(37, 16)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, gradient, theirs, autograds = both(x, angles, upstream)
    assert torch.equal(ours, theirs)
    exact = both(x.detach().double().requires_grad_(), angles, upstream.double())[3]
    unit = torch.finfo(dtype).eps / 2
    assert ((gradient.double() - exact).abs() <= 1.01 * unit * exact.abs() + 4e-7).all()
    assert (gradient.double() - exact).norm() <= (autograds.double() - exact).norm()


def test_backward_needs_the_angles_alone() -> None:
    x, angles, kept = queries(torch.bfloat16), angles_of(37, 16), list[int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate(x, angles)
    assert kept == [angles.data_ptr()]


def test_a_compiler_takes_it_whole_and_once_for_all_lengths() -> None:
    """What a GPU's compiler is given; here it is run as it is."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(_turned.__wrapped__, backend=count, fullgraph=True)  # type: ignore[attr-defined]
    for s in (37, 21, 55, 1024):
        for heads in (3, 2):
            x, angles = queries(torch.bfloat16, s, 1, heads).detach(), angles_of(s, 16)
            assert torch.equal(compiled(x, angles, back=False), written_out(x, angles))
    assert len(graphs) <= 3
