"""Comparison by hash, the way there and back, what a directory is, and the first layers of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_sead.errors import UserError
from tests.checkpoints import faults
from tests.checkpoints.training import train
from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool
from tests.models.parity import Layout

if TYPE_CHECKING:
    from megatron_sead.checkpoints.inspection import Inspection
    from megatron_sead.checkpoints.verification import RoundTrip, TensorComparison


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16; two KV heads for four heads, so that queries and keys have different shapes."""
    return faults.make_bf16_model(tmp_path_factory.mktemp("verification") / "model", heads=4, kv_heads=2)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def compare(expected: Path, found: Path) -> TensorComparison:
    from megatron_sead.checkpoints.model_files import open_model
    from megatron_sead.checkpoints.verification import compare_tensors

    with open_model(expected) as a, open_model(found) as b:
        return compare_tensors(a, b)


def round_trip(*args: Any, **kwargs: Any) -> RoundTrip:
    from megatron_sead.checkpoints.verification import round_trip as there_and_back

    return there_and_back(*args, **kwargs)


def inspect(directory: Path) -> Inspection:
    from megatron_sead.checkpoints.inspection import inspect_directory

    return inspect_directory(directory)


def truncate(*args: Any, **kwargs: Any) -> int:
    from megatron_sead.checkpoints.truncation import truncate as write_truncated

    return write_truncated(*args, **kwargs)


def test_a_flipped_bit_is_found_where_it_is(model: Path, tmp_path: Path) -> None:
    comparison = compare(model, faults.lowest_bit_flipped(model, tmp_path))
    (difference,) = comparison.differences
    before, after = (load_file(d / "model.safetensors")[faults.VICTIM] for d in (model, tmp_path / "changed"))
    assert (difference.name, difference.first, difference.different) == (faults.VICTIM, (1, 2), 1)
    assert difference.elements == 64 * 64
    assert (difference.expected, difference.found) == (before[1, 2].item(), after[1, 2].item())
    assert difference.largest == abs(difference.expected - difference.found) > 0
    assert comparison.tensors == 4 * 11 + 3


def test_bits_decide_not_values(copy: Path, tmp_path: Path) -> None:
    """-0 is not 0, and a NaN is the same NaN."""
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(copy / "model.safetensors")
    tensors[name][5, 6], tensors[name][7, 8] = 0.0, float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    assert compare(copy, other).differences == []
    tensors[name][5, 6] = -0.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (difference,) = compare(copy, other).differences
    assert (difference.first, difference.different) == ((5, 6), 1)


def test_the_fingerprint_is_the_models_whatever_the_format(model: Path, tmp_path: Path) -> None:
    checkpoint = faults.convert(model, tmp_path / "megatron")
    fingerprint = compare(model, model).fingerprint
    assert compare(checkpoint, checkpoint).fingerprint == fingerprint
    (tmp_path / "flipped").mkdir()
    assert compare(faults.lowest_bit_flipped(model, tmp_path / "flipped"), model).fingerprint != fingerprint


def test_another_dtype_is_compared_after_rounding(tmp_path: Path) -> None:
    from megatron_sead.checkpoints.conversion import huggingface_to_megatron

    wide = make_olmo3(tmp_path / "fp32")
    huggingface_to_megatron(wide, tmp_path / "bf16", dtype=torch.bfloat16)
    comparison = compare(wide, tmp_path / "bf16")
    assert (comparison.differences, comparison.rounded) == ([], ("float32", "bfloat16"))
    assert len(compare(tmp_path / "bf16", wide).differences) > 10  # rounding cannot be undone


def test_meaning_is_compared_not_form(model: Path, copy: Path) -> None:
    from megatron_sead.checkpoints.verification import meaning_differences

    config = json.loads((copy / "config.json").read_text())
    by_type = config.pop("rope_parameters")
    scaling = dict(by_type["full_attention"])
    legacy = config | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (copy / "config.json").write_text(json.dumps(legacy))
    assert meaning_differences(model, copy) == []
    (copy / "config.json").write_text(json.dumps(legacy | {"sliding_window": 7}))
    assert meaning_differences(model, copy) == ["sliding_window: 7 for 6"]


def test_there_and_back(model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    trip = round_trip(model, tmp_path, lambda *done: told.append(done))
    assert trip.exact
    assert (trip.tensors.tensors, trip.config, trip.damaged_companions) == (47, [], [])
    assert "tokenizer.json" in trip.companions and "generation_config.json" in trip.companions
    assert list(tmp_path.iterdir()) == []
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_what_is_lost_on_the_way_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sead.checkpoints import verification

    right = verification.megatron_to_huggingface

    def wrong(checkpoint: Path, output: Path, **kwargs: Any) -> Any:
        done = right(checkpoint, output, **kwargs)
        faults.edit_weights(output, lambda tensors: faults.flip(tensors[faults.VICTIM], 0))
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "rms_norm_eps": 1e-6}))
        (output / "chat_template.jinja").unlink()
        (output / "generation_config.json").write_text("{}")
        return done

    monkeypatch.setattr(verification, "megatron_to_huggingface", wrong)
    trip = round_trip(model, tmp_path)
    assert not trip.exact
    assert [difference.name for difference in trip.tensors.differences] == [faults.VICTIM]
    assert {line.split(":")[0] for line in trip.config} == {"layernorm_epsilon", "eos_token_id", "rms_norm_eps"}
    assert set(trip.damaged_companions) == {"chat_template.jinja", "generation_config.json"}


def test_nothing_is_left_of_a_way_that_failed(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("inf")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight has 1 of .* NaN or infinite"):
        round_trip(copy, tmp_path)
    assert list(tmp_path.iterdir()) == [copy]


def test_no_room_for_both_copies(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    with pytest.raises(UserError, match=r"there and back takes .* GB are free there; choose another disk"):
        round_trip(model, tmp_path)


def test_inspection_of_a_huggingface_directory(model: Path) -> None:
    found = inspect(model)
    assert (found.format, found.architecture) == ("Hugging Face (safetensors)", "Olmo3ForCausalLM")
    whole = AutoModelForCausalLM.from_pretrained(model)
    assert found.parameters == sum(p.numel() for p in whole.parameters())
    assert (found.dtypes, found.weight_bytes) == (["bfloat16"], 2 * found.parameters)
    assert found.files == [model / "model.safetensors"]
    assert found.disk_bytes == sum(path.stat().st_size for path in model.iterdir())
    assert (found.tensor_parallel_sizes, found.tensor_parallel_limit[:20]) == ([1, 2], "the 2 key/value head")
    assert (found.step, found.megatron_core, found.holds_optimizer) == (None, None, False)


def test_inspection_reads_no_weight(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sead.checkpoints.torch_dist_reader import TorchDistCheckpoint
    from megatron_sead.models.tensor_files import TensorFiles

    checkpoint = faults.convert(model, tmp_path / "megatron")
    monkeypatch.setattr(TensorFiles, "read", None)
    monkeypatch.setattr(TorchDistCheckpoint, "read", None)
    for directory in (model, checkpoint):
        inspect(directory)


def test_inspection_of_checkpoints(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    converted = inspect(faults.convert(model, tmp_path / "megatron"))
    assert converted.format.startswith("Megatron-Core")
    assert (converted.step, converted.megatron_core, converted.holds_optimizer) == (None, "0.16.1", False)
    assert (converted.dtypes, converted.parameters) == (["bfloat16"], inspect(model).parameters)

    ranks.run(train, model, Layout(tp=2), tmp_path / "run/checkpoints", steps=2, save_after=(1, 2))
    (tmp_path / "run/config.yaml").write_text(f"student:\n  path: {model}\n")
    run = inspect(tmp_path / "run")
    assert run.directory.name == "step-00000002"
    assert (run.step, run.steps, run.holds_optimizer, run.dtypes) == (2, (1, 2), True, ["float32"])
    assert run.layout == {"tensor": 2, "pipeline": 1, "virtual": 1, "data": 1}
    assert run.disk_bytes > 2 * run.weight_bytes


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn"}}, "legacy (rope_theta, rope_scaling: "),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "by layer type (rope_parameters: "),
        ({"rope_parameters": {"rope_type": "yarn"}}, "flat (rope_parameters without layer types; transformers 5.23"),
        ({"rope_parameters": {"rope_type": "default"}}, "flat (rope_parameters without layer types)"),
        ({}, "none: the family's defaults"),
        (
            {"rope_parameters": {"full_attention": {}}, "rope_theta": 5e5},
            "by layer type (rope_parameters: transformers",
        ),
    ],
)
def test_the_form_of_the_rotary_settings(changes: dict[str, Any], form: str) -> None:
    from megatron_sead.models.family import family_of

    fields = {"num_layers": 1, "layer_types": (), "yarn": None, "sliding_window": None, "full_theta": 5e5}
    described = dict(family_of("olmo3").describe(fields, {"model_type": "olmo3"} | changes))
    assert described["rope"].startswith(f"theta 500000; {form}")


def test_of_a_32b_at_most_8_ranks_hold_shares() -> None:
    from megatron_sead.checkpoints.inspection import _limit
    from megatron_sead.models.layout import tensor_parallel_sizes

    fields = {
        "num_attention_heads": 40,
        "num_query_groups": 8,
        "ffn_hidden_size": 27648,
        "padded_vocab_size": 100352,
    }
    assert tensor_parallel_sizes(fields) == [1, 2, 4, 8]
    assert _limit(fields) == "the 8 key/value heads must divide into equal, whole shares"


def test_neither_model_nor_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        inspect(tmp_path / "absent")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_the_first_layers_are_the_models(model: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    told: list[tuple[int, int]] = []
    count = truncate(
        model,
        tmp_path / "short",
        layers=3,
        max_shard_bytes=max_shard_bytes,
        advance=lambda *done: told.append(done),
    )
    whole, short = (AutoModelForCausalLM.from_pretrained(d) for d in (model, tmp_path / "short"))
    assert short.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert count == sum(p.numel() for p in short.parameters())
    assert told[-1] == (2 * count, 2 * count)
    expected = whole.state_dict()
    for name, tensor in short.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name])
    tokens = torch.arange(4, 44)[None]
    del whole.model.layers[3:]
    whole.config.num_hidden_layers = 3
    with torch.no_grad():
        assert torch.equal(short(tokens).logits, whole(tokens).logits)
    kept = {path.name for path in model.iterdir() if "safetensors" not in path.name}
    assert kept <= {path.name for path in (tmp_path / "short").iterdir()}


@pytest.mark.parametrize("layers", [-1, 0, 5])
def test_so_many_layers_it_has_not(model: Path, tmp_path: Path, layers: int) -> None:
    with pytest.raises(UserError, match=rf"layers={layers}: must be from 1 to 4"):
        truncate(model, tmp_path / "short", layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten_unasked(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    truncate(model, short, layers=2)
    before = (short / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists; choose another directory"):
        truncate(model, short, layers=1)
    assert (short / "model.safetensors").read_bytes() == before
    truncate(model, short, layers=1, overwrite=True)
    assert len(load_file(short / "model.safetensors")) == 11 + 3


def test_mixed_dtypes_are_not_made_one(copy: Path, tmp_path: Path) -> None:
    faults.edit_weights(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}))
    with pytest.raises(UserError, match=r"of several dtypes \(bfloat16, float32\)"):
        truncate(copy, tmp_path / "short", layers=1)
