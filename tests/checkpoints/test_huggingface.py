"""Model directories as transformers reads them, and the proof that notices what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_sead.errors import UserError

pytestmark = pytest.mark.transformers_lane


def write_huggingface_directory(*args: Any, **kwargs: Any) -> None:
    from megatron_sead.checkpoints.huggingface import (
        write_huggingface_directory as write,  # imports Megatron: not to be collected
    )

    write(*args, **kwargs)


def verify_huggingface_directory(*args: Any, **kwargs: Any) -> None:
    from megatron_sead.checkpoints.huggingface import verify_huggingface_directory as verify

    verify(*args, **kwargs)


def portable_config(*args: Any) -> dict[str, Any]:
    from megatron_sead.models.olmo3.family import portable_config as make_portable

    return make_portable(*args)


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def weights_of(directory: Path) -> list[tuple[str, torch.Tensor]]:
    return sorted(load_file(directory / "model.safetensors").items())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_transformers_loads_what_was_written(
    tiny_olmo3: Path, tmp_path: Path, alone: dist.ProcessGroup, max_shard_bytes: int, dtype: torch.dtype | None
) -> None:
    weights = weights_of(tiny_olmo3)
    out = tmp_path / "student-hf"
    write_huggingface_directory(
        out, iter(weights), source=tiny_olmo3, group=alone, dtype=dtype, max_shard_bytes=max_shard_bytes
    )
    verify_huggingface_directory(out, iter(weights), group=alone, dtype=dtype)

    ids = torch.arange(4, 44)[None]
    expected = AutoModelForCausalLM.from_pretrained(tiny_olmo3, dtype=dtype or "auto")(ids).logits
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == (dtype or torch.float32)
    assert torch.equal(model(ids).logits, expected)  # YaRN survives: 40 positions, original length 16
    assert model.generation_config.eos_token_id == [1, 3]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_olmo3).chat_template
    assert not list(tmp_path.glob(".*"))


def test_shards_are_bounded_and_indexed(tiny_olmo3: Path, tmp_path: Path, alone: dist.ProcessGroup) -> None:
    weights, limit = weights_of(tiny_olmo3), 40_000
    write_huggingface_directory(tmp_path / "m", iter(weights), source=tiny_olmo3, group=alone, max_shard_bytes=limit)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in weights)
    assert index["weight_map"].keys() == {name for name, _ in weights}
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    for file in files:
        with safe_open(file, "pt") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118 (not a dictionary)
        assert sum(sizes) <= limit or len(sizes) == 1


def test_rope_is_written_in_the_forms_that_all_versions_read(tiny_olmo3: Path) -> None:
    source = tiny_olmo3 / "config.json"
    hf = json.loads(source.read_text())
    config = portable_config(hf, source)
    assert config["rope_theta"] == 10000.0  # transformers 4.57
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert config["rope_parameters"] == hf["rope_parameters"]  # 5.x
    del config["rope_parameters"]
    assert portable_config(config, source)["rope_parameters"] == hf["rope_parameters"]


def test_two_rotary_bases_are_kept(tiny_olmo3: Path) -> None:
    source = tiny_olmo3 / "config.json"
    hf = json.loads(source.read_text())
    hf["rope_parameters"]["sliding_attention"]["rope_theta"] = 500.0
    assert portable_config(hf, source) == hf


def test_the_config_reads_back_as_the_source(tiny_olmo3: Path, tmp_path: Path, alone: dist.ProcessGroup) -> None:
    write_huggingface_directory(tmp_path / "m", weights_of(tiny_olmo3), source=tiny_olmo3, group=alone)
    before, after = AutoConfig.from_pretrained(tiny_olmo3), AutoConfig.from_pretrained(tmp_path / "m")
    assert after.rope_parameters == before.rope_parameters
    assert after.layer_types == before.layer_types


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lm_head.weight": None}, "lm_head.weight is missing"),
        ({"other.weight": torch.ones(1)}, "other.weight is not a weight of the model"),
        (
            {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)},
            r"model.norm.weight is torch.bfloat16 \[64\], not",
        ),
        ({"model.norm.weight": torch.ones(64).index_fill(0, torch.tensor(5), 1 + 2**-23)}, "differs in 1 of 64"),
        ({"model.norm.weight": torch.ones(32)}, r"float32 \[32\], not torch.float32 \[64\]"),
    ],
)
def test_a_directory_that_is_not_the_model_is_noticed(
    tiny_olmo3: Path,
    tmp_path: Path,
    alone: dist.ProcessGroup,
    change: dict[str, torch.Tensor | None],
    reason: str,
) -> None:
    weights, out = dict(weights_of(tiny_olmo3)), tmp_path / "m"
    write_huggingface_directory(out, weights.items(), source=tiny_olmo3, group=alone)
    changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    save_file(changed, out / "model.safetensors")
    with pytest.raises(RuntimeError, match=reason):
        verify_huggingface_directory(out, weights.items(), group=alone)


def test_nothing_but_a_model_is_replaced(tiny_olmo3: Path, tmp_path: Path, alone: dist.ProcessGroup) -> None:
    weights, out = weights_of(tiny_olmo3), tmp_path / "m"
    write_huggingface_directory(out, weights, source=tiny_olmo3, group=alone)
    write_huggingface_directory(out, weights, source=tiny_olmo3, group=alone)  # again: replaced
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/config.json").write_text("{}")
    with pytest.raises(UserError, match="thesis: exists and was not written by this tool"):
        write_huggingface_directory(tmp_path / "thesis", weights, source=tiny_olmo3, group=alone)


def test_a_full_disk_ends_in_one_line_after_all_weights_were_made(
    tiny_olmo3: Path, tmp_path: Path, alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_sead.checkpoints.shard_writer.ShardWriter.add", refuse)
    made = []
    weights = ((made.append(name) or name, tensor) for name, tensor in weights_of(tiny_olmo3))
    with pytest.raises(UserError, match=r"cannot be written there .*No space left"):
        write_huggingface_directory(tmp_path / "m", weights, source=tiny_olmo3, group=alone, max_shard_bytes=1)
    assert len(made) == len(weights_of(tiny_olmo3))
    assert not (tmp_path / "m").exists()
