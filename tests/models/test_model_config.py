"""Every released form of config.json is read alike; everything else is refused in one line that says what is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import RankPool
from tests.models.parity import Layout

pytestmark = pytest.mark.transformers_lane

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1}
BASE: dict[str, Any] = {
    "model_type": "olmo3",
    "vocab_size": 100278,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
LEGACY = {"rope_theta": 500000, "rope_scaling": YARN | {"attention_factor": 1.2079441541679836}}
NESTED = {
    "rope_parameters": {
        "full_attention": YARN | {"rope_theta": 500000.0, "attention_factor": 1.2079441541679836},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    }
}
FLAT = {"rope_parameters": YARN | {"rope_theta": 500000.0, "attention_factor": 1.2079441541679836}}
WITHOUT_FACTOR = {"rope_theta": 500000, "rope_scaling": YARN}  # 0.1 ln(8) + 1 is the same number


def write(directory: Path, hf: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(hf))
    return directory


def fields(hf_dir: Path) -> dict[str, Any]:
    from megatron_sead.models.family import read_config_fields

    found = read_config_fields(hf_dir)
    return found | {"yarn": found["yarn"] and vars(found["yarn"])}


def refusal(hf_dir: Path, layout: Layout) -> str:
    """The line that building the model ends with."""
    from megatron_sead.errors import UserError
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(layout.settings(), "cpu", seed=0)
    try:
        build_model(hf_dir, parallel, precision="fp32", attention_backend="torch")
    except UserError as error:
        return str(error)
    finally:
        destroy_parallel(keep_world=True)
    return ""


@pytest.mark.parametrize("rope", [LEGACY, NESTED, FLAT, WITHOUT_FACTOR], ids=["legacy", "nested", "flat", "no factor"])
def test_every_form_of_rope_parameters_means_the_same(ranks: RankPool, tmp_path: Path, rope: dict[str, Any]) -> None:
    found = ranks.run(fields, write(tmp_path, BASE | rope))[0]
    assert found["yarn"].pop("attention_factor") == pytest.approx(1.2079441541679836, abs=1e-15)
    assert found["yarn"] == {
        "factor": 8.0,
        "original_length": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    assert found["sliding_theta"] == found["full_theta"] == 500000.0


def test_the_32b_shape(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(fields, write(tmp_path, BASE | LEGACY))[0]
    assert found["layer_types"][:4] == ("sliding_attention",) * 3 + ("full_attention",)
    assert found["layer_types"][-1] == "full_attention"
    assert found["window_size"] == (4095, 0)  # to the left: Megatron's does not count the current token
    assert found["window_attn_skip_freq"] == [1, 1, 1, 0] * 16
    assert (found["num_query_groups"], found["kv_channels"]) == (8, 128)
    assert found["padded_vocab_size"] == 100352


def test_rotary_frequencies_are_those_of_transformers(ranks: RankPool, hf_dir: Path) -> None:
    """Bit for bit: both compute them in fp32."""
    from transformers import AutoConfig
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    theirs = Olmo3RotaryEmbedding(AutoConfig.from_pretrained(hf_dir))
    plain, yarn = ranks.run(frequencies, hf_dir)[0]
    assert plain.tolist() == theirs.sliding_attention_inv_freq.tolist()
    assert yarn.tolist() == pytest.approx(theirs.full_attention_inv_freq.tolist(), rel=2e-7)
    assert yarn.tolist() != plain.tolist()


def frequencies(hf_dir: Path) -> Any:
    from megatron_sead.models.family import read_config_fields
    from megatron_sead.models.olmo3.rotary import inverse_frequencies

    found = read_config_fields(hf_dir)
    d = found["kv_channels"]
    return inverse_frequencies(d, found["sliding_theta"], None), inverse_frequencies(
        d, found["full_theta"], found["yarn"]
    )


@pytest.mark.parametrize(
    ("changes", "layout", "line"),
    [
        ({"model_type": "olmo_hybrid"}, Layout(), "model_type='olmo_hybrid' is not supported; must be olmo3, olmo2"),
        ({"model_type": "mistral"}, Layout(), "model_type='mistral' is not supported"),
        ({"tie_word_embeddings": True}, Layout(), "tie_word_embeddings=True: only False is supported"),
        ({"attention_bias": True}, Layout(), "attention_bias=True: only False"),
        ({"hidden_act": "gelu"}, Layout(), "hidden_act='gelu': only 'silu'"),
        ({"layer_types": ["full_attention"]}, Layout(), "layer_types=['full_attention']: must name 64 layers"),
        ({"sliding_window": None}, Layout(), "sliding_window=None: must be positive"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Layout(), "rope_type='linear': must be default or yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, Layout(), "needs factor and original_max_position_embeddings"),
        ({"num_key_value_heads": 2}, Layout(tp=4), "tensor_model_parallel_size=4: does not divide the 2 key/value"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}, Layout(tp=4), "the 6 attention"),
        ({"num_hidden_layers": 1}, Layout(pp=2), "2 stages for the 1 layer of"),
        (
            {"num_hidden_layers": 3},
            Layout(pp=2, vpp=2),
            "pipeline_model_parallel_size=2 x virtual_pipeline_model_parallel_size=2: 4 stages for the 3 layers",
        ),
        ({"num_hidden_layers": 6}, Layout(pp=2, first=6), "parallel.first_stage_layers=6: leaves 0 of the 6 layers"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    ranks: RankPool, tmp_path: Path, changes: dict[str, Any], layout: Layout, line: str
) -> None:
    found = ranks.run(refusal, write(tmp_path, BASE | {"rope_theta": 500000.0} | changes), layout)
    assert all(line in message and "\n" not in message for message in found), found


def test_the_refusal_lists_valid_tensor_parallel_sizes(ranks: RankPool, tmp_path: Path) -> None:
    hf = BASE | {"rope_theta": 500000.0, "num_attention_heads": 12, "num_key_value_heads": 6}
    assert (
        "valid are 1, 2, 3, 6" not in ranks.run(refusal, write(tmp_path, hf), Layout(tp=4))[0]
    )  # 3 leaves 100352 over
    assert ranks.run(refusal, write(tmp_path, hf), Layout(tp=4))[0].endswith("valid are 1, 2")


def test_a_directory_without_a_model_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    assert "holds no config.json" in ranks.run(refusal, tmp_path, Layout())[0]
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in ranks.run(refusal, tmp_path, Layout())[0]


def test_transformer_engine_that_is_not_installed_is_refused(ranks: RankPool, hf_dir: Path) -> None:
    assert "transformer-engine is not installed" in ranks.run(te_refusal, hf_dir)[0]


def te_refusal(hf_dir: Path) -> str:
    from megatron_sead.errors import UserError
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(Layout().settings(), "cpu", seed=0)
    try:
        build_model(hf_dir, parallel, precision="fp32", attention_backend="transformer_engine")
    except UserError as error:
        return str(error)
    finally:
        destroy_parallel(keep_world=True)
    return ""
