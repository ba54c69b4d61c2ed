"""What a model's config.json says, in one form for all who ask. No torch here: a plan asks before there is any.

A key that is neither read nor known to leave the model's numbers alone is refused by name: without it, it is another
model.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sead.errors import UserError

log = logging.getLogger(__name__)

ARCHITECTURES = {"olmo3": "Olmo3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}
MODEL_TYPES = tuple(ARCHITECTURES)
SLIDING, FULL = "sliding_attention", "full_attention"
VOCABULARY_MULTIPLE = 128  # rows of the padded vocabulary, whatever the tensor-parallel size: 100278 -> 100352
DEFAULT_THETA = {"olmo3": 500000.0, "olmo2": 10000.0}
MOST_LAYERS, LARGEST_SIZE = 10_000, 2**24
LARGEST_NUMBER = 1e30

# One value alone is supported
EXPECTED = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False}
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_theta")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DTYPES = ("float64", "float32", "float16", "bfloat16")  # as transformers names them
READ = {"model_type", "architectures", *EXPECTED, *SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps"}
READ |= {"initializer_range", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
READ_OF_OLMO3 = {"layer_types", "sliding_window"}  # vLLM reads them of olmo2 too
# Says who wrote the file, in what, or what a caller gets back; nothing of what the model computes
HARMLESS = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "_commit_hash"}
HARMLESS |= {"_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_experts_implementation"}
HARMLESS |= {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript", "is_decoder"}
HARMLESS |= {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"}
HARMLESS |= {"tokenizer_class", "use_bfloat16", "tf_legacy_loss", "unsloth_version", "unsloth_fixed"}
HARMLESS |= {f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "cls", "unk", "mask", "decoder_start")}
# Settings of generation, which transformers 4 writes here too
HARMLESS |= {"max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"}
HARMLESS |= {"num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p", "min_p"}
HARMLESS |= {"repetition_penalty", "length_penalty", "diversity_penalty", "exponential_decay_length_penalty"}
HARMLESS |= {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "remove_invalid_values"}
HARMLESS |= {"forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"}
HARMLESS |= {"output_scores", "return_dict_in_generate"}
HARMLESS |= {"gradient_checkpointing", "keys_to_ignore_at_inference", "transformers.js_config", "_from_model_config"}
HARMLESS |= {"use_flash_attn", "use_flash_attention_2", "_flash_attn_2_enabled"}
# What this family does not have: with a value that is false, 0, empty or null, such a key changes nothing
ABSENT = {"mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "add_bias_linear", "attention_out_bias", "lm_head_bias"}
ABSENT |= {"clip_qkv", "final_logit_softcapping", "attn_logit_softcapping", "logit_softcap", "num_experts"}
ABSENT |= {
    "num_local_experts",
    "n_routed_experts",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
}
ABSENT |= {"attn_pdrop", "residual_dropout", "embedding_dropout", "attention_probs_dropout_prob", "pruned_heads"}
ABSENT |= {"quantization_config", "per_layer_config", "transformers_weights", "auto_map", "add_cross_attention"}
ABSENT |= {"cross_attention_hidden_size", "is_encoder_decoder", "tie_encoder_decoder", "chunk_size_feed_forward"}
# Not Granite's attention_multiplier, which is the whole scale of the scores
FACTORS = {"logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "lm_head_multiplier"}
FACTORS |= {"partial_rotary_factor", "pretraining_tp"}

ROPE_KEYS = {"rope_type", "type", "rope_theta"}
YARN_KEYS = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}
# Values with which other keys of a rotary embedding change nothing; mscale counts together with mscale_all_dim
ROPE_NEUTRAL = {"partial_rotary_factor": 1, "attn_factor": 1, "extrapolation_factor": 1}
ROPE_NEUTRAL |= {"factor": 1, "attention_factor": 1, "mscale": 0, "mscale_all_dim": 0}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071), on full-attention layers alone."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin, so that scores grow by its square
    truncate: bool = True  # round the correction range outwards to whole dimensions


@dataclass(frozen=True)
class _Section:
    """An object of the file, with the names that a message needs. null is no value; `without_null` makes it one."""

    values: Mapping[str, Any]
    source: Path
    prefix: str = ""

    def refusal(self, name: str, reason: str) -> UserError:
        return UserError(f"{self.source}: {self.prefix}{name}={_shown(self.values.get(name))}: {reason}")

    def section(self, name: str) -> _Section:
        values = self.values.get(name)
        if values is not None and not isinstance(values, dict):
            raise self.refusal(name, "must be a JSON object or null")
        return _Section(values or {}, self.source, f"{self.prefix}{name}.")

    def without_null(self, *names: str) -> _Section:
        """With these names left out where they are null: transformers takes that for their default."""
        null = {name for name in names if self.values.get(name) is None}
        return replace(self, values={name: value for name, value in self.values.items() if name not in null})

    def whole(self, name: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        value = self.values.get(name, default)
        if value is None and default is None:
            raise UserError(f"{self.source}: {self.prefix}{name} is missing")
        if type(value) is not int or not 1 <= value <= most:  # transformers takes neither 4.0 nor "4" for 4
            raise self.refusal(name, f"must be a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float | None = None) -> float:
        """Positive, or from `least`."""
        value = self.values.get(name, default)
        if value is None and default is None:
            raise UserError(f"{self.source}: {self.prefix}{name} is missing")
        small_enough = type(value) in (int, float) and value <= LARGEST_NUMBER
        if not small_enough or not (value > 0 if least is None else value >= least):
            raise self.refusal(name, f"must be a number {'above 0' if least is None else f'from {least:g}'}")
        return float(value)


def read_hf_config(hf_dir: Path) -> dict[str, Any]:
    """``config.json``, of a supported model_type.

    Raises:
        UserError: no such file, not JSON, or another architecture.
    """
    source = hf_dir / "config.json"
    try:
        hf = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{hf_dir}: holds no config.json; must be a Hugging Face model directory") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise UserError(f"{source}: must hold a JSON object")
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{source}: model_type={_shown(model_type)} is not supported; must be {' or '.join(MODEL_TYPES)}"
        )
    return hf


def olmo3_fields(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """Fields of an `Olmo3Config` that a Hugging Face ``config.json`` decides.

    Args:
        hf: the parsed file, of any transformers version.
        source: the file, for messages.

    Raises:
        UserError: a field is missing, has a value that this family does not have, or is unknown and may change what
            the model computes.
    """
    config = _Section(hf, source).without_null(*NULLABLE)
    _refuse_unknown_variants(config)
    layers = config.whole("num_hidden_layers", most=MOST_LAYERS)
    layer_types = _layer_types(config, layers)
    window = _window(config, layer_types)
    vocab_size = config.whole("vocab_size")
    return {
        "num_layers": layers,
        **_attention(config),
        "ffn_hidden_size": config.whole("intermediate_size"),
        "layernorm_epsilon": config.number("rms_norm_eps", 1e-5),
        "init_method_std": config.number("initializer_range", 0.02, least=0),
        "layer_types": layer_types,
        "sliding_window": window,
        # Transformer Engine's form of the same: tokens to the left, and which layers have the window
        "window_size": (window - 1, 0) if window else None,
        "window_attn_skip_freq": [int(kind == SLIDING) for kind in layer_types] if window else None,
        **_rotary(config),
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocabulary(vocab_size),
        "max_position_embeddings": config.whole("max_position_embeddings", 2048),
    }


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of embedding and head over all tensor-parallel ranks."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _refuse_unknown_variants(config: _Section) -> None:
    hf = config.values
    family = hf["model_type"]
    for name, value in EXPECTED.items():
        given = hf.get(name, value)
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise config.refusal(name, f"only {value!r} is supported for {family}")
    if hf.get("architectures") not in (None, [ARCHITECTURES[family]]):
        raise config.refusal("architectures", f"must be [{ARCHITECTURES[family]!r}] for model_type {family}")
    for name in ("dtype", "torch_dtype"):
        if hf.get(name) not in (None, *DTYPES):
            raise config.refusal(name, f"must be one of {', '.join(DTYPES)}, or null")
    read = READ | READ_OF_OLMO3 if family == "olmo3" or _all_full(hf.get("layer_types")) else READ
    for name, value in hf.items():
        if name not in read | HARMLESS and not _is_off(name, value):
            raise config.refusal(
                name, f"not known for {family}, and may change what the model computes; take it out if it does not"
            )


def _all_full(layer_types: object) -> bool:
    return isinstance(layer_types, list) and all(kind == FULL for kind in layer_types)


def _is_off(name: str, value: object) -> bool:
    if name in FACTORS:
        return value is None or (value == 1 and value is not True)
    return (name in ABSENT and not value) or (name == "is_causal" and value is True)


def _attention(config: _Section) -> dict[str, int]:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    groups = config.whole("num_key_value_heads", heads)
    if heads % groups:
        raise config.refusal("num_key_value_heads", f"must divide the {heads} attention heads (num_attention_heads)")
    width = config.whole("head_dim", max(hidden // heads, 1))  # rounded down, as transformers does
    if width % 2:
        raise UserError(f"{config.source}: heads are {width} wide (head_dim, or hidden_size / heads); must be even")
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups, "kv_channels": width}


def _layer_types(config: _Section, layers: int) -> tuple[str, ...]:
    given = config.values.get("layer_types")
    if config.values["model_type"] == "olmo2":
        return (FULL,) * layers
    if given is None:
        return tuple(SLIDING if (i + 1) % 4 else FULL for i in range(layers))
    if not isinstance(given, list) or len(given) != layers or not all(kind in (SLIDING, FULL) for kind in given):
        raise config.refusal("layer_types", f"must name {layers} layers, each {SLIDING} or {FULL}")
    return tuple(given)


def _window(config: _Section, layer_types: tuple[str, ...]) -> int | None:
    if config.values["model_type"] == "olmo2":
        return None
    if config.values.get("sliding_window") is None:
        if SLIDING not in layer_types:
            return None
        raise config.refusal("sliding_window", "must be positive, since layer_types has sliding layers")
    window = config.whole("sliding_window")
    return window if SLIDING in layer_types else None


def _rotary(config: _Section) -> dict[str, Any]:
    """Rotary bases, and YaRN of the full layers, from any form that transformers has written.

    ``rope_theta`` with ``rope_scaling`` (4.57, and the released files); ``rope_parameters`` by layer type (5.x); flat
    ``rope_parameters``, which some 5.x versions saved. transformers 5.23 reads the flat form as no YaRN at all,
    5.2.0 as YaRN on every layer; here it means what the released files mean by the same numbers. Two forms in one
    file must say the same, for each version reads another one.
    """
    scaling, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    full = sliding = parameters if parameters.values else scaling
    if config.values["model_type"] == "olmo3" and {FULL, SLIDING} & parameters.values.keys():
        if unknown := parameters.values.keys() - {FULL, SLIDING}:
            raise parameters.refusal(min(unknown), f"must stand in {FULL} or {SLIDING}, which are given too")
        full, sliding = parameters.section(FULL), parameters.section(SLIDING)
        if _rope_type(sliding) != "default":
            raise sliding.refusal("rope_type", "must be default")
    elif parameters.values and _rope_type(full) == "yarn" and config.values["model_type"] == "olmo3":
        log.warning("%s: flat rope_parameters; YaRN is applied to full-attention layers only", config.source)
    theta = config.number("rope_theta", _default_theta(config, full, sliding))
    for section in (scaling, full, sliding):
        _refuse_unknown_rope(section)
        if config.values.get("rope_theta") is not None and section.number("rope_theta", theta) != theta:
            raise section.refusal("rope_theta", f"must be the file's own rope_theta={theta:g}, or one of them alone")
    yarn = _yarn(full)
    if scaling.values and _yarn(scaling) != yarn:
        raise UserError(f"{config.source}: rope_scaling and rope_parameters differ; must say the same, or one alone")
    return {
        "sliding_theta": sliding.number("rope_theta", theta),
        "full_theta": full.number("rope_theta", theta),
        "yarn": yarn,
    }


def _default_theta(config: _Section, full: _Section, sliding: _Section) -> float:
    """What transformers takes where a file names none, if its versions agree."""
    family = config.values["model_type"]
    named = all("rope_theta" in values for values in (full.values, sliding.values)) or "rope_theta" in config.values
    if family == "olmo3" and not named and not config.values.get("rope_parameters"):  # which only 5.x writes
        raise UserError(f"{config.source}: rope_theta is missing: transformers 4.57 takes 10000 for it, 5.x 500000")
    return DEFAULT_THETA[family]


def _rope_type(section: _Section) -> str:
    given = [section.values[key] for key in ("rope_type", "type") if section.values.get(key) is not None]
    kind = given[0] if given else "default"
    if kind not in ("default", "yarn") or given[1:] not in ([], [kind]):
        raise UserError(
            f"{section.source}: {section.prefix}rope_type={' and type='.join(map(_shown, given))}: "
            "must be default or yarn"
        )
    return str(kind)


def _refuse_unknown_rope(section: _Section) -> None:
    kind = _rope_type(section)
    read = ROPE_KEYS | YARN_KEYS if kind == "yarn" else ROPE_KEYS
    for name, value in section.values.items():
        neutral = value is None or (type(value) in (int, float) and value == ROPE_NEUTRAL.get(name))
        if name not in read and not neutral:
            raise section.refusal(
                name,
                f"not read for rope_type {kind}, and may change what the model computes; take it out if it does not",
            )


def _yarn(section: _Section) -> YarnScaling | None:
    if _rope_type(section) != "yarn":
        return None
    section = section.without_null("beta_fast", "beta_slow", "attention_factor", "rope_theta")
    if section.values.get("factor") is None or section.values.get("original_max_position_embeddings") is None:
        raise UserError(
            f"{section.source}: {section.prefix}rope_type yarn needs factor and original_max_position_embeddings"
        )
    factor, truncate = section.number("factor", least=1), section.values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise section.refusal("truncate", "must be true or false")
    return YarnScaling(
        factor=factor,
        original_length=section.whole("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast", 32),
        beta_slow=section.number("beta_slow", 1),
        attention_factor=section.number("attention_factor", 0.1 * math.log(factor) + 1.0),
        truncate=truncate,
    )


def _shown(value: object, limit: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[:limit] + "..."
