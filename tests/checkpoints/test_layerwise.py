"""Models that are the same agree on a long text, layer by layer; each fault shows, and in the layer where it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.errors import UserError
from tests.checkpoints import faults
from tests.checkpoints.training import train
from tests.distributed.ranks import RankPool
from tests.models.parity import Layout

LENGTH = 48  # beyond the window, 6, and YaRN's original length, 16
# fp32 states of a few layers apart by the order of summation: 4e-7 were seen. The smallest fault below is 1e-2.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16; sliding, full, sliding, full; every head a KV head, so that queries and keys have one shape."""
    return faults.make_bf16_model(tmp_path_factory.mktemp("layerwise") / "model", heads=2, kv_heads=2)


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(4, 60, (length,), generator=torch.Generator().manual_seed(5))


def agree(hf_dir: Path, checkpoint: Path, *, yarn_on_every_layer: bool = False) -> dict[str, Any]:
    """On a rank: what `compare_on_text` finds, pieces small enough that every loop over them turns."""
    from megatron_sead.checkpoints import layerwise
    from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel
    from megatron_sead.models import streamed
    from megatron_sead.models.olmo3.config import Olmo3Config
    from megatron_sead.models.olmo3.rotary import DualRotaryEmbedding
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    told: list[tuple[int, int]] = []
    parallel = initialize_parallel(ParallelSettings(), "cpu", seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "HEAD_TOKENS", 7)
        for name, value in {"MLP_TOKENS": 10, "HEAD_ROWS": 13}.items():
            patch.setattr(streamed, name, value)
        if yarn_on_every_layer:
            right = DualRotaryEmbedding.forward
            patch.setattr(DualRotaryEmbedding, "forward", lambda self, n: right(self, n)[[1, 1]])
            scale = Olmo3Config.attention_scale
            patch.setattr(Olmo3Config, "attention_scale", lambda self, _: scale(self, 2))
        with HuggingFaceModel(hf_dir) as hf, MegatronModel(checkpoint) as megatron:
            found = layerwise.compare_on_text(hf, megatron, tokens(), parallel, lambda *done: told.append(done))
    destroy_parallel(keep_world=True)
    return asdict(found) | {"first_wrong": found.first_wrong, "same": found.same, "told": told}


def on_first_rank(function: Callable[..., Any], *args: Any) -> None:
    """On a rank, where any Megatron-Core can be imported."""
    if os.environ["RANK"] == "0":
        function(*args)


def export(checkpoint: Path, hf_dir: Path) -> None:
    from megatron_sead.checkpoints.conversion import megatron_to_huggingface

    megatron_to_huggingface(checkpoint, hf_dir)


@pytest.mark.mcore_lane
def test_the_same_model_agrees(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    ranks.run(on_first_rank, faults.convert, model, tmp_path / "megatron")
    found = ranks.run(agree, model, tmp_path / "megatron")[0]
    assert [stage["name"] for stage in found["stages"]] == [
        "embedding",
        "layer 0 (sliding)",
        "layer 1 (full)",
        "layer 2 (sliding)",
        "layer 3 (full)",
        "final norm",
    ]
    assert found["stages"][0]["difference"] == 0
    assert max(stage["difference"] for stage in found["stages"]) < TOLERANCE
    assert found["same"] and found["first_wrong"] is None
    assert 0 < found["mean"] < found["largest"] < 1e-4
    assert [done for done, _ in found["told"]] == [total * n // 4 for n, (_, total) in enumerate(found["told"], 1)]

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = -whole(tokens()[None], labels=tokens()[None]).loss.item()
    assert found["text"] == pytest.approx((expected, expected), rel=1e-5)


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (faults.window_off_by_one, "layer 0 (sliding)"),
        (faults.no_yarn, "layer 1 (full)"),
        (faults.query_and_key_swapped, "layer 1 (full)"),
        (faults.gate_and_up_swapped, "layer 1 (full)"),
        (faults.highest_exponent_bit_flipped, "layer 1 (full)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_shows_in_its_layer(
    ranks: RankPool, model: Path, tmp_path: Path, fault: Callable[[Path, Path], Path], first: str
) -> None:
    found = ranks.run(agree, model, fault(model, tmp_path))[0]
    assert not found["same"]
    assert found["first_wrong"] == first
    by_name = {stage["name"]: stage["difference"] for stage in found["stages"]}
    assert by_name[first] > 1e-3 or by_name[first] != by_name[first]
    assert found["largest"] > 1e-2 or found["largest"] != found["largest"]


def test_yarn_on_every_layer_shows(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    found = ranks.run(agree, model, faults.convert(model, tmp_path / "megatron"), yarn_on_every_layer=True)[0]
    assert found["first_wrong"] == "layer 0 (sliding)"
    assert found["largest"] > 1e-2


@pytest.mark.mcore_lane
def test_a_checkpoint_that_ranks_of_training_wrote(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    """Its tensors are in pieces, by rank, and an optimizer lies among them."""
    ranks.run(train, model, Layout(tp=2), tmp_path, steps=1, save_after=(1,))
    checkpoint = tmp_path / "step-00000001"
    shutil.copyfile(model / "config.json", checkpoint / "config.json")
    ranks.run(on_first_rank, export, checkpoint, tmp_path / "exported")
    assert ranks.run(agree, tmp_path / "exported", checkpoint)[0]["same"]
    found = ranks.run(agree, model, checkpoint)[0]  # a step of Adam, 1e-3, later
    assert found["first_wrong"] == "embedding"


def test_a_state_that_is_no_number_is_wrong() -> None:
    from megatron_sead.checkpoints.layerwise import Agreement, Stage

    found = Agreement(9, [Stage("embedding", 0.0), Stage("layer 0", float("nan")), Stage("layer 1", 1.0)])
    assert (found.first_wrong, found.same) == ("layer 0", False)
    assert not Agreement(9, [Stage("embedding", 0.0)], largest=float("nan")).same


def read(directory: Path, length: int | None, text: Path | None = None) -> torch.Tensor:
    from megatron_sead.checkpoints.layerwise import read_tokens
    from megatron_sead.checkpoints.model_files import HuggingFaceModel

    with HuggingFaceModel(directory) as hf:
        return read_tokens(hf, length, text)


def test_the_text_is_real_and_long_enough(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a box of 10 and " * 200)
    given = read(model, 40, text)
    from_python = read(model, None)
    assert given.shape == (40,)
    assert len(from_python) == 16 + 256
    assert len(set(from_python.tolist())) > 20


@pytest.mark.parametrize("length", [1, 16])
def test_a_text_that_can_show_no_fault_is_refused(model: Path, length: int) -> None:
    with pytest.raises(UserError, match=rf"tokens={length}: must be more than 16 \(sliding window 6, YaRN from 16\)"):
        read(model, length)


def test_bad_texts(model: Path, tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("ten of a box")
    binary.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match=r"short.txt: has 10 tokens of the 20 wanted; give a longer file"):
        read(model, 20, short)
    with pytest.raises(UserError, match=r"documentation of Python.*of the 10,000,000 wanted"):
        read(model, 10_000_000)
    with pytest.raises(UserError, match="not a UTF-8 text"):
        read(model, 20, binary)
    with pytest.raises(UserError, match="absent: no such file"):
        read(model, 20, tmp_path / "absent")


def test_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(UserError, match="bare: holds no tokenizer"):
        read(bare, 20)
