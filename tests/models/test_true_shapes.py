"""The check at true widths (tools/check_true_shapes.py), here at small ones: that it agrees, and that faults show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sead.config.parallel import ParallelSettings
from tests.distributed.ranks import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # in the ranks too, which import this file

from true_shapes.errors import Distance, Seen, merge
from true_shapes.launch import passed, summary
from true_shapes.model import SHAPES, Shape
from true_shapes.passes import _release, megatron_pass, transformers_pass

SMALL = Shape(hidden=128, heads=4, kv_heads=2, ffn=320, vocab=1003)  # 21 rows of padding, all on the last rank


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model/ and reference/."""
    folder = tmp_path_factory.mktemp("true-shapes")
    ranks.run(prepare, folder)
    return folder


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Seen:
    return Seen.from_json(ranks.run(by_transformers, folder, "fp32")[0])


def prepare(folder: Path) -> None:
    import os

    from true_shapes.model import write_model

    if os.environ["RANK"] == "0":
        write_model(folder / "model", SMALL)
        transformers_pass(folder / "model", SMALL, torch.float32, folder / "reference", write=True)


def by_transformers(folder: Path, precision: str) -> dict[str, Any]:
    from megatron_sead.models.builder import DTYPES

    seen = transformers_pass(folder / "model", SMALL, DTYPES[precision], folder / "reference", write=False)
    return seen.to_json()


def by_megatron(folder: Path, precision: str, tp: int, fault: str = "") -> dict[str, Any]:
    from megatron_sead.models.olmo3.norms import SumOverRanks
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    def wider_window(model: Any) -> None:
        model.decoder.layers[0].self_attention.core_attention.window += 1

    with pytest.MonkeyPatch.context() as patch:
        if fault == "backward":
            patch.setattr(SumOverRanks, "backward", staticmethod(lambda ctx, grad: (grad, None)))
        parallel = initialize_parallel(ParallelSettings(tensor_model_parallel_size=tp), "cpu", seed=0)
        seen = megatron_pass(
            folder / "model",
            SMALL,
            precision,
            folder / "reference",
            parallel,
            wider_window if fault == "window" else None,
        )
    destroy_parallel(keep_world=True)
    return seen.to_json()


def measure(ranks: RankPool, folder: Path, reference: Seen, precision: str, tp: int, fault: str = "") -> dict[str, Any]:
    seen = merge([Seen.from_json(s) for s in ranks.run(by_megatron, folder, precision, tp, fault)[:tp]])
    result = {"megatron": summary(seen, reference)}
    if precision == "bf16":
        theirs = Seen.from_json(ranks.run(by_transformers, folder, "bf16")[0])
        result["transformers"] = summary(theirs, reference)
    return result


@pytest.mark.parametrize("tp", [1, 2])
def test_fp32(ranks: RankPool, folder: Path, reference: Seen, tp: int) -> None:
    result = measure(ranks, folder, reference, "fp32", tp)
    ours = result["megatron"]
    assert passed(result)
    assert ours["logits"]["l2"] < 5e-6 and ours["worst_gradient"]["l2"] < 2e-5  # 1e-6 and 2e-6 were seen
    assert ours["loss"] < 1e-6
    assert len(ours["gradients_l2"]) == 2 * 8 + 3


def test_transformers_again_is_the_reference(reference: Seen) -> None:
    assert reference.logits.largest == 0
    assert max(distance.largest for distance in reference.gradients.values()) == 0
    assert len(reference.gradients) == 2 * 11 + 3
    assert reference.peak_bytes > 0


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_is_as_near_to_fp32_as_transformers_is(ranks: RankPool, folder: Path, reference: Seen, tp: int) -> None:
    result = measure(ranks, folder, reference, "bf16", tp)
    assert passed(result)
    assert 1e-3 < result["megatron"]["logits"]["l2"] < 5e-2


@pytest.mark.parametrize(("precision", "fault"), [("fp32", "window"), ("fp32", "backward"), ("bf16", "window")])
def test_faults_show(ranks: RankPool, folder: Path, reference: Seen, precision: str, fault: str) -> None:
    result = measure(ranks, folder, reference, precision, 2, fault)
    assert not passed(result)
    if fault == "backward":  # in gradients alone
        assert result["megatron"]["logits"]["l2"] < 5e-6


def test_distances_of_shares_add_up() -> None:
    found, expected = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    whole = Distance.between(found, expected)
    assert whole.relative()["l2"] == pytest.approx(((found - expected).norm() / expected.norm()).item())
    assert whole.relative()["max"] == pytest.approx(((found - expected).abs().max() / expected.abs().max()).item())
    shares = Distance.between(found[:20], expected[:20]) + Distance.between(found[20:], expected[20:])
    assert shares.relative() == pytest.approx(whole.relative())


def test_every_rank_counts() -> None:
    """A share that is wrong on the second rank alone."""
    right, wrong = Distance(0.0, 1.0, 0.0, 1.0), Distance(4.0, 1.0, 2.0, 1.0)
    merged = merge([Seen(1.0, right, {"a": right}, 10), Seen(1.0, wrong, {"a": wrong}, 20)])
    assert merged.gradients["a"] == merged.logits == Distance(4.0, 2.0, 2.0, 1.0)
    assert merged.peak_bytes == 30


def test_a_gradient_is_let_go_when_it_has_been_used() -> None:
    parameter, used = torch.nn.Parameter(torch.ones(3)), []
    parameter.register_post_accumulate_grad_hook(_release(Seen(), lambda grad: used.append(grad.tolist())))
    (2 * parameter).sum().backward()
    assert parameter.grad is None
    assert used == [[2.0, 2.0, 2.0]]


def test_the_shapes_are_the_released_ones() -> None:
    """Two layers of the 7B and the 32B: their parameters, less the other layers'."""
    for name, layers, total in (("7b", 32, 7_298_011_136), ("32b", 64, 32_233_522_176)):
        shape = SHAPES[name]
        outside = 2 * shape.largest + shape.hidden
        assert outside + (shape.parameters - outside) // 2 * layers == total
