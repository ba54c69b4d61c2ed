"""What released models of every family say in config.json is read; what a family does not have is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from megatron_sead.errors import UserError
from megatron_sead.models.family import config_fields, families, family_of, read_config_fields
from megatron_sead.models.weight_tables import Weight
from megatron_sead.models.weights import named_weights

SOURCE = Path("config.json")
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
COMMON: dict[str, Any] = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
LLAMA_31_8B: dict[str, Any] = COMMON | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "transformers_version": "4.42.3",
}
LLAMA_32_1B = LLAMA_31_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA3 | {"factor": 32.0},
    "tie_word_embeddings": True,
}
TINY_LLAMA: dict[str, Any] = COMMON | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SMOLLM2_135M = TINY_LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "is_llama_config": True,
    "rope_interleaved": False,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
QWEN3_06B: dict[str, Any] = COMMON | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "max_window_layers": 28,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3_32B = QWEN3_06B | {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "max_window_layers": 64,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("hf", "parameters"),
    [
        (LLAMA_31_8B, 8_030_261_248),
        (LLAMA_32_1B, 1_235_814_400),
        (TINY_LLAMA, 1_100_048_384),
        (SMOLLM2_135M, 134_515_008),
        (QWEN3_06B, 596_049_920),
        (QWEN3_32B, 32_762_123_264),
    ],
    ids=["llama-3.1-8b", "llama-3.2-1b", "tinyllama", "smollm2", "qwen3-0.6b", "qwen3-32b"],
)
def test_a_released_model_is_read(hf: dict[str, Any], parameters: int) -> None:
    """Its parameters are as many as were released; written for other versions, it means the same."""
    fields = config_fields(hf, SOURCE)
    assert sum(named.weight.elements for named in named_weights(SimpleNamespace(**fields))) == parameters
    written = family_of(hf["model_type"]).portable_config(hf, SOURCE)
    assert config_fields(written, SOURCE) == fields
    assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == fields["theta"]
    without = {key: value for key, value in written.items() if key != "rope_parameters"}  # as 4.57 reads it
    assert config_fields(without, SOURCE) == fields
    without = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}  # as 5.x
    assert config_fields(without, SOURCE) == fields


@pytest.mark.parametrize(
    ("hf", "changes", "line"),
    [
        (LLAMA_31_8B, {"attention_bias": True}, "attention_bias=True: only False is supported for llama"),
        (LLAMA_31_8B, {"mlp_bias": True}, "mlp_bias=True: not known for llama"),
        (LLAMA_31_8B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear': must be default or ll"),
        (LLAMA_31_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (LLAMA_31_8B, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "must be less than high_freq_factor=4"),
        (LLAMA_31_8B, {"rope_scaling": LLAMA3 | {"attention_factor": 1.2}}, "attention_factor=1.2: not read for rope"),
        (LLAMA_31_8B, {"rope_parameters": {"rope_theta": 5e5}}, "rope_scaling and rope_parameters differ"),
        (LLAMA_31_8B, {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, "must be the file's own rope_theta=500000"),
        (LLAMA_31_8B, {"architectures": ["LlamaModel"]}, "architectures=['LlamaModel']: must be"),
        (LLAMA_31_8B, {"tie_word_embeddings": 0}, "tie_word_embeddings=0: must be true or false"),
        (LLAMA_31_8B, {"pretraining_tp": 2}, "pretraining_tp=2: not known"),
        (LLAMA_31_8B, {"sliding_window": 4096}, "sliding_window=4096: not known for llama"),
        (SMOLLM2_135M, {"rope_interleaved": True}, "rope_interleaved=True: only False"),
        (QWEN3_06B, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window=True: only False"),
        (QWEN3_06B, {"layer_types": ["sliding_attention"] * 28}, "must name 28 layers, each full_attention"),
        (QWEN3_06B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn': must be default"),
        (QWEN3_06B, {"num_experts": 128}, "num_experts=128: not known for qwen3"),
        (QWEN3_06B, {"num_key_value_heads": 5}, "must divide the 16 attention heads"),
    ],
    ids=str,
)
def test_what_a_family_does_not_have_is_refused(hf: dict[str, Any], changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config_fields(hf | changes, SOURCE)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", families())
def test_what_transformers_saves_is_read_with_the_same_defaults(model_type: str, tmp_path: Path) -> None:
    """A configuration nobody has filled in: sizes, heads, epsilon, rotary base and head."""
    architecture = family_of(model_type).architectures[model_type]
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(bos_token_id=1, eos_token_id=2)
    config.architectures = [architecture]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    fields = read_config_fields(tmp_path)
    assert fields["kv_channels"] == (getattr(config, "head_dim", None) or config.hidden_size // 32)
    assert fields["num_query_groups"] == config.num_key_value_heads
    assert fields["layernorm_epsilon"] == config.rms_norm_eps
    assert fields["tied_embeddings"] is config.tie_word_embeddings is False


@pytest.mark.parametrize("model_type", families())
def test_every_weight_table_undoes_itself(model_type: str) -> None:
    """Joined row numbers, of whole tensors and of a rank's share, split into what they were; `runs` says the same."""
    import torch

    sizes = {"num_attention_heads": 12, "num_query_groups": 6, "kv_channels": 4, "hidden_size": 10}
    fields = SimpleNamespace(**sizes, ffn_hidden_size=18)
    for weight in family_of(model_type).layer_weights(fields):
        parts = _row_numbers(weight)
        joined = weight.join(parts)
        assert all(torch.equal(a, b) for a, b in zip(weight.split(joined), parts, strict=True))
        for run in weight.row_spans():
            rows = parts[run.part][run.row : run.row + run.rows]
            assert torch.equal(joined[run.megatron_row : run.megatron_row + run.rows], rows)
        assert sum(run.rows for run in weight.row_spans()) == len(joined)


def _row_numbers(weight: Weight) -> list[Any]:
    import torch

    lengths = [shape[0] for shape in weight.shapes]
    return list(torch.arange(sum(lengths)).split(lengths))
