"""The projections' norm keeps little for its backward pass, whose gradients are those that autograd would find."""

from __future__ import annotations

import torch

from megatron_sead.models.olmo3.norms import Scale, SumOfSquares


def normalize(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return Scale.apply(x, SumOfSquares.apply(x) / x.shape[-1], weight, 1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize, (x, weight))


def test_backward_needs_the_input_and_a_number_a_token() -> None:
    x = torch.randn(64, 1, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(256, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normalize(x, weight)
    assert sum(kept.values()) == x.nbytes + weight.nbytes + 64 * 4
