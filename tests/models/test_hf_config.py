"""What config.json may say: read as transformers reads it, or refused in one line that names the key and its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.models.family import config_fields, read_config_fields, read_hf_config
from megatron_sead.models.hf_config import HARMLESS, READ
from megatron_sead.models.olmo3.hf_config import READ_OF_OLMO3, YarnScaling
from megatron_sead.planning.shapes import read_shape

ROOT = Path(__file__).parents[2]
RELEASED: dict[str, Any] = json.loads((ROOT / "examples/shapes/olmo3-7b/config.json").read_text())
YARN: dict[str, Any] = RELEASED["rope_scaling"]
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
BY_TYPE = {"full_attention": YARN | {"rope_theta": 500000.0}, "sliding_attention": PLAIN}


def fields(**changes: Any) -> dict[str, Any]:
    return config_fields(RELEASED | changes, Path("config.json"))


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        fields(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Numbers ---------------------------------------------------------------------------------------------------------

NO_SIZES = [4.0, "4", 0, -4, True, [4], {}, float("nan"), float("inf"), 10**30]
NO_NUMBERS = ["1", 0, -1.0, True, [1.0], float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
    ],
)
def test_a_size_that_is_no_whole_number_is_refused(name: str, value: object) -> None:
    assert f"config.json: {name}=" in refusal(**{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_a_number_that_is_none_is_refused(name: str, value: object) -> None:
    assert f"config.json: {name}=" in refusal(**{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("name", ["factor", "attention_factor", "beta_fast", "beta_slow", "rope_theta"])
def test_a_rotary_number_that_is_none_is_refused(name: str, value: object) -> None:
    assert f"rope_scaling.{name}=" in refusal(rope_scaling=YARN | {name: value})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_null_is_no_size(name: str) -> None:
    assert f"{name} is missing" in refusal(**{name: None})


@pytest.mark.parametrize("name", ["max_position_embeddings", "rms_norm_eps", "initializer_range"])
def test_null_is_not_the_default_where_transformers_refuses_it(name: str) -> None:
    assert f"{name}=None: must be a" in refusal(**{name: None})


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "layer_types"])
def test_null_is_the_default_where_transformers_takes_it(name: str) -> None:
    assert fields(**{name: None}) == fields(num_key_value_heads=32)


def test_a_base_on_which_versions_of_transformers_differ_must_be_given() -> None:
    assert "rope_theta is missing" in refusal(rope_theta=None)
    assert "rope_theta is missing" in refusal(rope_theta=None, rope_scaling=None)
    assert fields(rope_theta=None, rope_scaling=None, rope_parameters=BY_TYPE) == fields()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "heads are 585 wide"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5: must divide the 32 attention heads"),
        ({"num_key_value_heads": 64}, "num_key_value_heads=64: must divide"),
        ({"head_dim": 65}, "heads are 65 wide"),
        ({"initializer_range": "0.02"}, "initializer_range='0.02': must be a number from 0"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor=0.5: must be a number from 1"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 8192.0}}, "must be a whole number"),
        ({"rope_scaling": YARN | {"truncate": None}}, "rope_scaling.truncate=None: must be true or false"),
        ({"rope_scaling": [YARN]}, "must be a JSON object or null"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': must be a JSON object"),
        ({"rope_parameters": 8}, "rope_parameters=8: must be a JSON object"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": 8}}, "rope_parameters.full_attention=8: must be"),
        ({"layer_types": "sliding_attention"}, "must name 32 layers"),
        ({"layer_types": [["sliding_attention"]] * 32}, "must name 32 layers"),
    ],
    ids=str,
)
def test_what_numbers_must_be_to_each_other(changes: dict[str, Any], line: str) -> None:
    assert line in refusal(**changes)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{", "\xff", "[" * 100_000], ids=lambda text: text[:4])
def test_a_file_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json: (not JSON|must hold a JSON object)"):
        read_hf_config(tmp_path)


def test_the_plan_refuses_in_the_same_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {"num_hidden_layers": 4.0}))
    with pytest.raises(UserError, match=r"num_hidden_layers=4\.0: must be a whole number from 1"):
        read_shape(ModelSettings(path=tmp_path), "student")


# --- Keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mlp_bias", True), ("clip_qkv", 8.0), ("clip_qkv", 1.0), ("final_logit_softcapping", 30.0)),
        *(("logit_scale", 0.5), ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("logits_scaling", 0)),
        *(("use_sliding_window", True), ("quantization_config", {"quant_method": "fp8"}), ("num_experts", 8)),
        *(("per_layer_config", {"0": {"head_dim": 8}}), ("transformers_weights", "other.safetensors")),
        *(("pretraining_tp", 2), ("partial_rotary_factor", 0.5), ("auto_map", {"AutoModel": "code.Model"})),
        *(("attention_dropout", 0.1), ("attention_bias", "false"), ("hidden_act", "gelu"), ("qk_norm", "l2")),
        *(
            ("architectures", ["LlamaForCausalLM"]),
            ("architectures", "Olmo3ForCausalLM"),
            ("add_cross_attention", True),
        ),
        *(("dtype", "int8"), ("torch_dtype", 16), ("dtype", ["float32"])),
        *(("norm_after", False), ("use_qk_norm", False), ("rms_norm", False), ("rope", None), ("is_causal", False)),
        *(("attention_bias", None), ("attention_bias", 0), ("tie_word_embeddings", 0), ("attention_dropout", False)),
        *(("attention_multiplier", 1.0), ("use_sliding_window", False), ("no_rope_layers", []), ("causal", None)),
        *(("original_max_position_embeddings", 4096), ("pruned_heads", {"0": [1]}), ("is_encoder_decoder", True)),
    ],
    ids=str,
)
def test_an_unknown_key_that_may_change_the_numbers_is_refused(name: str, value: object) -> None:
    assert f"config.json: {name}=" in refusal(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mlp_bias", False), ("clip_qkv", None), ("logit_scale", 1.0), ("embedding_multiplier", None)),
        *(("quantization_config", None), ("num_experts", 0), ("pretraining_tp", 1), ("partial_rotary_factor", 1.0)),
        *(("is_causal", True), ("hidden_dropout", 0.0), ("gradient_checkpointing", True), ("auto_map", {})),
        *(("unsloth_version", "2025.1"), ("_name_or_path", "allenai/x"), ("pruned_heads", {}), ("temperature", 0.6)),
    ],
    ids=str,
)
def test_a_key_that_is_off_or_says_nothing_of_the_numbers_passes(name: str, value: object) -> None:
    assert fields(**{name: value}) == fields()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mscale", 1.0), ("mscale_all_dim", 0.707), ("short_factor", [1.0]), ("low_freq_factor", 1.0)),
        *(("partial_rotary_factor", 0.5), ("attn_factor", 2.0), ("truncated", True), ("apply_yarn_scaling", False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["rope_scaling", "flat", "by type"])
def test_an_unknown_key_of_the_rotary_embedding_is_refused(form: str, name: str, value: object) -> None:
    rope = YARN | {name: value}
    forms: dict[str, dict[str, Any]] = {
        "rope_scaling": {"rope_scaling": rope},
        "flat": {"rope_scaling": None, "rope_parameters": rope},
        "by type": {"rope_scaling": None, "rope_parameters": BY_TYPE | {"full_attention": rope}},
    }
    assert f"{name}=" in refusal(**forms[form])
    plain = {"rope_scaling": None, "rope_parameters": BY_TYPE | {"sliding_attention": PLAIN | {name: value}}}
    assert f"rope_parameters.sliding_attention.{name}=" in refusal(**plain)


def test_neutral_keys_of_the_rotary_embedding_pass() -> None:
    neutral = {"mscale": None, "mscale_all_dim": 0, "partial_rotary_factor": 1.0, "attn_factor": 1}
    assert fields(rope_scaling=YARN | neutral) == fields()
    assert fields(rope_scaling=YARN | {"truncate": False})["yarn"].truncate is False


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rope_parameters": BY_TYPE | {"full_attention": None}}, "rope_scaling and rope_parameters differ"),
        ({"rope_parameters": BY_TYPE | {"full_attention": YARN | {"factor": 4.0}}}, "rope_parameters differ"),
        ({"rope_parameters": BY_TYPE | {"full_attention": YARN | {"rope_theta": 1e6}}}, "rope_theta=1000000.0: must"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope_type='yarn' and type='linear'"),
        ({"rope_parameters": BY_TYPE | {"chunked_attention": PLAIN}}, "rope_parameters.chunked_attention="),
        ({"rope_scaling": {"rope_type": "default", "factor": 8}}, "rope_scaling.factor=8: not read for rope_type"),
    ],
    ids=str,
)
def test_two_forms_that_say_different_things_are_refused(changes: dict[str, Any], line: str) -> None:
    assert line in refusal(**changes)


def test_two_forms_that_say_the_same_pass() -> None:
    assert fields(rope_parameters=BY_TYPE) == fields()
    assert isinstance(fields()["yarn"], YarnScaling)


def test_olmo2_has_no_sliding_layers() -> None:
    """transformers sees none in it, vLLM does."""
    olmo2 = {"model_type": "olmo2", "architectures": None, "rope_scaling": None}
    assert "layer_types=" in refusal(**olmo2)
    assert fields(**olmo2, layer_types=["full_attention"] * 32)["sliding_window"] is None
    assert fields(**olmo2, layer_types=None, sliding_window=None)["layer_types"] == ("full_attention",) * 32


@pytest.mark.parametrize("family", ["Olmo2Config", "Olmo3Config"])
def test_what_transformers_saves_passes(family: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, family)(pad_token_id=1, eos_token_id=2)
    config.architectures = [family.replace("Config", "ForCausalLM")]
    assert config.to_dict().keys() <= READ | READ_OF_OLMO3 | HARMLESS | {
        "chunk_size_feed_forward",  # 0
        "is_encoder_decoder",  # false
    }
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    assert read_config_fields(tmp_path)["num_layers"] == 32


def test_what_transformers_4_saves_passes() -> None:
    """Every field of 4.57's PretrainedConfig, with its default."""
    off = ("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder", "torchscript")
    off += ("use_bfloat16", "tf_legacy_loss", "do_sample", "early_stopping", "output_scores", "remove_invalid_values")
    off += ("return_dict_in_generate", "output_hidden_states", "output_attentions")
    empty = ("cross_attention_hidden_size", "finetuning_task", "task_specific_params", "problem_type", "prefix")
    empty += ("tokenizer_class", "sep_token_id", "decoder_start_token_id", "bad_words_ids", "forced_bos_token_id")
    empty += ("forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens")
    saved = dict.fromkeys(off, False) | dict.fromkeys(empty) | {"pruned_heads": {}, "chunk_size_feed_forward": 0}
    saved |= {"id2label": {"0": "A"}, "label2id": {"A": 0}, "return_dict": True, "max_length": 20, "min_length": 0}
    saved |= {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50}
    saved |= {"top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0}
    saved |= {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1}
    saved |= {"transformers_version": "4.57.6", "_name_or_path": "", "_attn_implementation_autoset": True}
    assert fields(**saved) == fields()
