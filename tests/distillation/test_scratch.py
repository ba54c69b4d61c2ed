"""Memory that tensors on a CPU hand on to each other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_sead.distillation import linear_weighted_divergence, weighted_divergence
from megatron_sead.distillation.scratch import LARGE, large_empty, large_empty_like, release
from tools.loss_benchmark.meters import resident_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release()
    yield
    release()


def large(rows: int) -> torch.Tensor:
    return large_empty((rows, LARGE), torch.float32, CPU)


def place(rows: int) -> int:
    return large(rows).data_ptr()


def test_the_next_tensor_gets_the_memory_of_one_that_is_gone() -> None:
    places = [place(rows) for rows in (3, 3, 2)]
    assert len(set(places)) == 1


def test_a_view_holds_the_memory() -> None:
    view = large(2)[1].fill_(1.0)
    other = large(2).fill_(2.0)
    assert bool((view == 1.0).all()) and bool((other == 2.0).all())
    assert view.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_each_gets_the_least_that_is_large_enough() -> None:
    together = {rows: large(rows) for rows in (4, 2, 3)}
    places = {rows: tensor.data_ptr() for rows, tensor in together.items()}
    del together
    again = [large(rows) for rows in (2, 3, 4)]
    assert [tensor.data_ptr() for tensor in again] == [places[2], places[3], places[4]]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_is_kept_does_not_grow_with_the_sizes_and_can_be_given_back() -> None:
    before = resident_bytes("VmRSS")
    for rows in range(1, 9):
        large(rows).fill_(1.0)
    most = 8 * LARGE * 4
    assert before + 0.9 * most < resident_bytes("VmRSS") < before + 1.1 * most
    used = large(1).fill_(1.0)
    release()
    assert resident_bytes("VmRSS") > before + 0.9 * used.nbytes
    del used
    release()
    assert resident_bytes("VmRSS") < before + 0.1 * most


def test_a_larger_call_gets_as_much_as_it_needs() -> None:
    place(1)
    tensors = [large(3).fill_(1.0) for _ in range(2)]
    assert [float(tensor[-1, -1]) for tensor in tensors] == [1.0, 1.0]


def test_a_call_that_fails_hands_its_memory_on() -> None:
    def fail() -> None:
        tensor = large(2).fill_(7.0)
        raise RuntimeError(tensor.shape)

    with pytest.raises(RuntimeError):
        fail()
    assert bool((large(2) == 7.0).all())  # new memory is zero


def test_threads_never_share_memory() -> None:
    def use(mark: int) -> bool:
        return all(bool((large(1).fill_(mark) == mark).all()) for _ in range(30))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(8)))


def test_a_rank_that_holds_only_padding_needs_none() -> None:
    assert large_empty((2, 0), torch.float32, CPU).shape == (2, 0)


def test_what_others_left_in_the_memory_does_not_matter() -> None:
    torch.manual_seed(0)
    tokens, columns, real = 40, 2**16, 2**16 - 5
    hidden, head = torch.randn(tokens, 16, requires_grad=True), torch.randn(columns, 16, requires_grad=True)
    weight = torch.rand(tokens) * (torch.arange(tokens) % 3 != 0)

    def gradients() -> list[torch.Tensor]:
        arguments = hidden.detach() + 1, head.detach(), weight, weight
        fused = linear_weighted_divergence(hidden, head, *arguments, vocab_size=real)
        logits = (hidden @ head.t()).detach().requires_grad_()
        whole = weighted_divergence(logits, logits.detach().roll(1), weight, weight, vocab_size=real)
        return [*torch.autograd.grad(fused.sum(), (hidden, head)), *torch.autograd.grad(whole.sum(), logits)]

    clean = [gradient.clone() for gradient in gradients()]
    several = [large(4).fill_(torch.nan) for _ in range(6)]
    assert {tensor.isnan().all().item() for tensor in several} == {True}
    del several
    assert all(torch.equal(*pair) for pair in zip(gradients(), clean, strict=True))


def test_what_a_call_returned_stays_when_the_next_one_writes() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 64, requires_grad=True), torch.randn(2**16, 64, requires_grad=True)
    weight = torch.rand(40)

    def step() -> list[torch.Tensor]:
        loss = linear_weighted_divergence(hidden, head, hidden.detach() + 1, head.detach(), weight, weight)
        return [loss, *torch.autograd.grad(loss.sum(), (hidden, head))]

    results = step()
    assert results[-1].nbytes >= LARGE
    before = [result.clone() for result in results]
    linear_weighted_divergence(hidden, head * 3, hidden, head, weight, weight).sum().backward()
    assert all(torch.equal(result, copy) for result, copy in zip(results, before, strict=True))
    assert all(torch.equal(result, again) for result, again in zip(results, step(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_as_torch_makes_them(dtype: torch.dtype) -> None:
    """Also where large pages are not asked for: of a few numbers, or of rows in another order in memory."""
    for tensor in (torch.empty(LARGE, 2), torch.empty(LARGE, 2).t(), torch.empty(2, 3), torch.empty(0, LARGE)):
        found, expected = large_empty_like(tensor, dtype), torch.empty_like(tensor, dtype=dtype)
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, dtype, expected.stride())
        found.fill_(3.0)
        assert not found.numel() or float(found[-1, -1]) == 3.0
