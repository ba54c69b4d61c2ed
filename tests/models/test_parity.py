"""The Megatron model is transformers' model: logits, token loss and every weight's gradient, under every layout.

Tolerance: 1e-5, relative to the largest entry of each tensor, in fp32. Summation order alone gives up to 3e-6 (sums
over 16 to 64 terms at unit roundoff 6e-8, through four layers and back); the smallest of the faults below gives
3e-4, most of them more than 1e-1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool
from tests.models.conftest import vary_norms
from tests.models.parity import Batch, Layout, Measured, make_batch, megatron_step, merge, reference_step

TOLERANCE = 1e-5

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=4),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, sp=True),
    Layout(recompute="full"),
    Layout(tp=2, recompute="selective"),
    Layout(tp=2, sp=True, recompute="full"),
    Layout(tp=2, pp=2, sp=True, recompute="full"),
    Layout(tp=2, pp=2, vpp=2, recompute="full"),
]


@pytest.fixture(scope="module")
def batch(hf_dir: Path) -> Batch:
    from transformers import AutoConfig

    return make_batch(AutoConfig.from_pretrained(hf_dir).vocab_size)


@pytest.fixture(scope="module")
def reference(hf_dir: Path, batch: Batch) -> Measured:
    return reference_step(hf_dir, batch)


@pytest.mark.mcore_lane
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_is_transformers(
    ranks: RankPool, hf_dir: Path, batch: Batch, reference: Measured, layout: Layout
) -> None:
    worst = merge(ranks.run(megatron_step, hf_dir, layout, batch)).worst(reference)
    print(f"{layout}: {worst}")
    assert max(worst.values()) < TOLERANCE


UNEVEN = [
    Layout(pp=2),
    Layout(pp=4),
    Layout(pp=2, first=1),
    Layout(tp=2, pp=2, sp=True, last=2),
    Layout(pp=2, vpp=2),
    Layout(pp=2, vpp=3, recompute="full"),
    Layout(pp=2, vpp=2, first=2),
]


@pytest.fixture(scope="module")
def seven_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kinds in no order that a stage could repeat by chance."""
    sliding, full = "sliding_attention", "full_attention"
    directory = make_olmo3(
        tmp_path_factory.mktemp("seven"),
        num_hidden_layers=7,
        layer_types=[full, sliding, sliding, full, sliding, full, full],
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        pad_token_id=None,
        initializer_range=0.2,
    )
    vary_norms(directory / "model.safetensors")
    return directory


@pytest.mark.mcore_lane
def test_stages_of_unequal_depth_are_transformers(ranks: RankPool, seven_layers: Path) -> None:
    from transformers import AutoConfig

    batch = make_batch(AutoConfig.from_pretrained(seven_layers).vocab_size)
    reference = reference_step(seven_layers, batch)
    for layout in UNEVEN:
        worst = merge(ranks.run(megatron_step, seven_layers, layout, batch)).worst(reference)
        assert max(worst.values()) < TOLERANCE, (layout, worst)


# --- What a mistake would look like: each must be seen ---------------------------------------------------------------


@contextmanager
def _patched(target: Any, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(target, name, value):
        yield


def no_backward_all_reduce(chunks: list[Any]) -> AbstractContextManager[None]:
    from megatron_sead.models.olmo3.norms import SumOverRanks

    return _patched(SumOverRanks, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def local_mean_square(chunks: list[Any]) -> AbstractContextManager[None]:
    from megatron_sead.models.olmo3 import norms

    return _patched(norms, "_all_reduce", lambda x, group: x * group.size())


def per_head_norm(chunks: list[Any]) -> AbstractContextManager[None]:
    from megatron_sead.models.olmo3 import attention

    def by_head(tensors: list[torch.Tensor], group: Any) -> list[torch.Tensor]:
        d = chunks[0].config.kv_channels
        heads = [x.unflatten(-1, (-1, d)) for x in tensors]
        return [(x.square().sum(-1, keepdim=True).expand_as(x) * x.shape[-2] * group.size()).flatten(-2) for x in heads]

    return _patched(attention, "sums_of_squares", by_head)


def window_off_by_one(chunks: list[Any]) -> None:
    for module in _modules(chunks, "TorchCoreAttention"):
        module.window = module.window and module.window + 1


def yarn_on_every_layer(chunks: list[Any]) -> None:
    chunks[0].rotary_pos_emb.frequencies[0] = chunks[0].rotary_pos_emb.frequencies[1]
    scale = max(module.scale for module in _modules(chunks, "TorchCoreAttention"))
    for module in _modules(chunks, "TorchCoreAttention"):
        module.scale = scale


def yarn_without_magnitude(chunks: list[Any]) -> None:
    scale = min(module.scale for module in _modules(chunks, "TorchCoreAttention"))
    for module in _modules(chunks, "TorchCoreAttention"):
        module.scale = scale


def larger_eps(chunks: list[Any]) -> None:
    for module in _modules(chunks, "RMSNorm") + _modules(chunks, "ProjectionRMSNorm"):
        module.eps = 1e-5


def norms_without_the_sequence_parallel_mark(chunks: list[Any]) -> None:
    for module in _modules(chunks, "RMSNorm"):
        module.weight.sequence_parallel = False


def hidden_gradient_summed_twice(chunks: list[Any]) -> AbstractContextManager[None]:
    from megatron_sead.models import decoder

    gather = decoder.gather_from_sequence_parallel_region
    return _patched(decoder, "gather_from_sequence_parallel_region", lambda x, group, **kwargs: gather(x, group=group))


def _modules(chunks: list[Any], kind: str) -> list[Any]:
    return [module for chunk in chunks for module in chunk.modules() if type(module).__name__ == kind]


@pytest.mark.parametrize(
    ("fault", "layout", "logits_show_it"),
    [
        (no_backward_all_reduce, Layout(tp=2), False),
        (local_mean_square, Layout(tp=2), True),
        (per_head_norm, Layout(tp=2), True),
        (window_off_by_one, Layout(), True),
        (yarn_on_every_layer, Layout(), True),
        (yarn_without_magnitude, Layout(), True),
        (larger_eps, Layout(), True),
        (norms_without_the_sequence_parallel_mark, Layout(tp=2, sp=True), False),
        (hidden_gradient_summed_twice, Layout(tp=2, sp=True), False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_fault_is_seen(
    ranks: RankPool, hf_dir: Path, batch: Batch, reference: Measured, fault: Any, layout: Layout, logits_show_it: bool
) -> None:
    worst = merge(ranks.run(megatron_step, hf_dir, layout, batch, fault=fault)).worst(reference)
    print(f"{fault.__name__}: {worst}")
    assert worst["gradients"] > 10 * TOLERANCE
    assert (worst["logits"] > TOLERANCE) == logits_show_it


def test_padded_columns_in_the_softmax_are_seen(
    ranks: RankPool, hf_dir: Path, batch: Batch, reference: Measured
) -> None:
    found = merge(ranks.run(megatron_step, hf_dir, Layout(tp=2), batch, mask_padding=False)).worst(reference)
    assert found["logits"] < TOLERANCE
    assert found["losses"] > 10 * TOLERANCE


# --- OLMo-2: the same layers, every one with full attention and plain rotary angles ----------------------------------


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_olmo2_is_transformers(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        initializer_range=0.2,
    )
    Olmo2ForCausalLM(config).save_pretrained(tmp_path)
    vary_norms(tmp_path / "model.safetensors")
    batch = make_batch(60)
    worst = merge(ranks.run(megatron_step, tmp_path, layout, batch)).worst(reference_step(tmp_path, batch))
    assert max(worst.values()) < TOLERANCE


@pytest.mark.parametrize("layout", [Layout(pp=4, vpp=2), Layout(pp=2, vpp=4)], ids=str)
def test_as_many_micro_batches_as_stages(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    """Of different lengths: the case in which Megatron's own exchange of shapes waits for ever."""
    kinds = ["sliding_attention", "full_attention"] * 4
    directory = make_olmo3(tmp_path, num_hidden_layers=8, layer_types=kinds, pad_token_id=None, initializer_range=0.2)
    batch = make_batch(50)  # four micro-batches
    worst = merge(ranks.run(megatron_step, directory, layout, batch)).worst(reference_step(directory, batch))
    assert max(worst.values()) < TOLERANCE
