"""Schedule, weight decay, clipping, and the update itself against torch's AdamW in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sead.config.parallel import ParallelSettings
from tests.checkpoints.training import settings, train
from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool, RankPools
from tests.models.parity import Layout


@pytest.fixture(scope="session")
def ranks(pools: RankPools) -> RankPool:
    return pools.of(2)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_olmo3(tmp_path_factory.mktemp("optimizer") / "student", num_key_value_heads=2)


def build(hf_dir: Path, changes: dict[str, Any], gradient: float | None = None, updates: int = 0) -> dict[str, Any]:
    """On a rank: build, and update so many times with every gradient element at `gradient` on each DP rank."""
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_sead.training.optimizer import apply_gradients, build_optimizer

    parallel = initialize_parallel(ParallelSettings(), "cpu", seed=0)
    how = settings(**({"precision": "fp32", "distributed": True} | changes))
    chunks = build_model(hf_dir, parallel, precision=how.precision)
    ddp_chunks, optimizer, scheduler = build_optimizer(chunks, how, parallel)
    rates, norms = [], []
    try:
        for _ in range(updates):
            rates.append(optimizer.param_groups[0]["lr"])
            assert all(group["lr"] == rates[-1] for group in optimizer.param_groups)
            if gradient is not None:
                _put_gradients(ddp_chunks, optimizer, gradient)
                optimizer.prepare_grads()
                norms.append(apply_gradients(optimizer))
            scheduler.step(increment=1)
        decays = {
            (group["weight_decay"], parameter.dim())
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        weights = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
        last_hidden = ddp_chunks[0](torch.tensor([[4, 5]]), torch.tensor([[0, 1]]), None)
    finally:
        destroy_parallel(keep_world=True)
    numel = sum(p.numel() for p in weights.values())
    return {
        "rates": rates,
        "norms": norms,
        "decays": decays,
        "weights": weights,
        "numel": numel,
        "dtype": last_hidden.dtype,
    }


def _put_gradients(ddp_chunks: list[Any], optimizer: Any, gradient: float) -> None:
    for chunk in ddp_chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(gradient)
        chunk.finish_grad_sync()  # per-token loss: a sum over the two data-parallel ranks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_decay_style": "linear", "lr_warmup_steps": 0}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_decay_style": "linear", "lr_warmup_steps": 2}, [1 / 3, 2 / 3, 1, 1 / 2]),
        ({"lr_decay_style": "constant", "lr_warmup_steps": 1}, [1 / 2, 1, 1, 1]),
        ({"lr_decay_style": "constant", "lr_warmup_steps": 4}, [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
        ({"lr_decay_style": "cosine", "lr_warmup_steps": 0}, [1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5]),
        ({"lr_decay_style": "linear", "lr_warmup_steps": 0, "min_lr": 5e-4}, [1, 7 / 8, 6 / 8, 5 / 8]),
    ],
)
def test_learning_rate_of_each_update(
    ranks: RankPool, hf_dir: Path, changes: dict[str, Any], expected: list[float]
) -> None:
    for built in ranks.run(build, hf_dir, {"steps": 4} | changes, updates=4):
        assert built["rates"] == pytest.approx([1e-3 * share for share in expected])


def test_an_update_is_adamw_on_the_sum_over_ranks_without_decay_of_norms(ranks: RankPool, hf_dir: Path) -> None:
    """Tolerance 1e-6: fp32 rounding of two updates of 1e-3 on weights around 1."""
    changes = {"steps": 4, "lr_warmup_steps": 0, "weight_decay": 0.5, "clip_grad": 0.0}
    before = ranks.run(build, hf_dir, changes)[0]["weights"]
    built = ranks.run(build, hf_dir, changes, gradient=0.25, updates=2)
    assert built[0]["decays"] == built[1]["decays"] <= {(0.5, 1), (0.0, 1)}  # shards are flat: decay by group
    assert {decay for decay, _ in built[0]["decays"]} == {0.5, 0.0}

    parameters = {name: torch.nn.Parameter(weight.double()) for name, weight in before.items()}
    for name, parameter in parameters.items():
        decay = 0.5 if parameter.dim() > 1 else 0.0
        adam = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
        for rate in (1e-3, 0.75e-3):
            adam.param_groups[0]["lr"] = rate
            parameter.grad = torch.full_like(parameter, 2 * 0.25)
            adam.step()
        for rank in range(2):
            torch.testing.assert_close(built[rank]["weights"][name].double(), parameter.detach(), rtol=0, atol=1e-6)


def test_gradients_are_clipped_by_their_global_norm(ranks: RankPool, hf_dir: Path) -> None:
    """Adam hides a scale, so beta1 = 0 and a large eps: the update is then lr * clipped gradient / eps."""
    changes = {"steps": 4, "lr_warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.0, "adam_eps": 100.0, "lr": 1.0}
    before = ranks.run(build, hf_dir, changes)[0]
    after = ranks.run(build, hf_dir, changes | {"clip_grad": 1.0}, gradient=0.5, updates=1)[0]
    norm = before["numel"] ** 0.5  # of ones: 0.5 on each of two ranks
    assert after["norms"] == [pytest.approx(norm, rel=1e-5)]
    name = "decoder.final_layernorm.weight"
    moved = before["weights"][name] - after["weights"][name]
    # Weights of 1 are stored to 6e-8, the movement is 1/100/norm = 3e-5
    torch.testing.assert_close(moved, torch.full_like(moved, 1 / norm / 100), rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_hidden_states_keep_the_models_precision(
    ranks: RankPool, hf_dir: Path, precision: str, dtype: torch.dtype
) -> None:
    assert ranks.run(build, hf_dir, {"precision": precision})[0]["dtype"] == dtype


@pytest.mark.mcore_lane
def test_all_ways_to_hold_the_optimizer_train_alike(ranks: RankPool, hf_dir: Path, tmp_path: Path) -> None:
    """fp32, three steps, relative 1e-5: sharded over data-parallel ranks, or whole on each; TP 2."""
    sharded, whole, tensor_parallel = (
        ranks.run(train, hf_dir, layout, tmp_path, distributed=distributed)[0].losses
        for layout, distributed in ((Layout(), True), (Layout(), False), (Layout(tp=2), True))
    )
    assert whole == pytest.approx(sharded, rel=1e-5)
    assert tensor_parallel == pytest.approx(sharded, rel=1e-5)
    assert len(set(sharded)) == 3
