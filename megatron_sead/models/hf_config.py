"""Reading a model's config.json: what every family needs. No torch here: a plan asks before there is any.

A key that is neither read nor known to leave the model's numbers alone is refused by name, because a model built
without it may be another model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_sead.errors import UserError

SLIDING, FULL = "sliding_attention", "full_attention"
VOCABULARY_MULTIPLE = 128  # rows of the padded vocabulary, whatever the tensor-parallel size: 100278 -> 100352
MOST_LAYERS, LARGEST_SIZE = 10_000, 2**24
LARGEST_NUMBER = 1e30

Scaling = TypeVar("Scaling")  # of rotary embeddings, a family's dataclass

# One value alone is supported, in every family
EXPECTED = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_theta")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DTYPES = ("float64", "float32", "float16", "bfloat16")  # as transformers names them
READ = {"model_type", "architectures", *EXPECTED, *SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps"}
READ |= {"initializer_range", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
READ |= {"tie_word_embeddings"}
# Says who wrote the file, in what, or what a caller gets back; nothing of what the model computes
HARMLESS = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "_commit_hash"}
HARMLESS |= {"_model_name_or_path"}  # of a GGUF file
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
# What no family here has: with a value that is false, 0, empty or null, such a key changes nothing
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

# Keys that are read of a rotary embedding, by its kind, beside those of `ROPE_KEYS`
ROPE_KEYS = {"rope_type", "type", "rope_theta"}
SCALING_KEYS: dict[str, set[str]] = {
    "default": set(),
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "truncate"),
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
LEGACY_FORM = "legacy (rope_theta, rope_scaling: transformers 4.57)"
# Values with which other keys of a rotary embedding change nothing; mscale counts together with mscale_all_dim
ROPE_NEUTRAL = {"partial_rotary_factor": 1, "attn_factor": 1, "extrapolation_factor": 1}
ROPE_NEUTRAL |= {"factor": 1, "attention_factor": 1, "mscale": 0, "mscale_all_dim": 0}


@dataclass(frozen=True)
class Section:
    """An object of the file, with the names that a message needs. null is no value; `without_null` makes it one."""

    values: Mapping[str, Any]
    source: Path
    prefix: str = ""

    def refusal(self, name: str, reason: str) -> UserError:
        return UserError(f"{self.source}: {self.prefix}{name}={shown(self.values.get(name))}: {reason}")

    def section(self, name: str) -> Section:
        values = self.values.get(name)
        if values is not None and not isinstance(values, dict):
            raise self.refusal(name, "must be a JSON object or null")
        return Section(values or {}, self.source, f"{self.prefix}{name}.")

    def without_null(self, *names: str) -> Section:
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


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of embedding and head over all tensor-parallel ranks."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def refuse_unknown(
    config: Section, architecture: str, *, read: Collection[str] = (), expected: Mapping[str, object] | None = None
) -> None:
    """Refuse what the file says beyond what is read of it, unless it leaves the model's numbers alone.

    Args:
        architecture: transformers' class of this model_type.
        read: keys that the family reads beside `READ`.
        expected: keys of which it supports one value alone, beside `EXPECTED`.

    Raises:
        UserError: names the key and its value.
    """
    hf, family = config.values, config.values["model_type"]
    for name, value in (EXPECTED | dict(expected or {})).items():
        given = hf.get(name, value)
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise config.refusal(name, f"only {value!r} is supported for {family}")
    if hf.get("architectures") not in (None, [architecture]):
        raise config.refusal("architectures", f"must be [{architecture!r}] for model_type {family}")
    for name in ("dtype", "torch_dtype"):
        if hf.get(name) not in (None, *DTYPES):
            raise config.refusal(name, f"must be one of {', '.join(DTYPES)}, or null")
    known = READ | HARMLESS | set(expected or ()) | set(read)
    for name, value in hf.items():
        if name not in known and not _is_off(name, value):
            raise config.refusal(
                name, f"not known for {family}, and may change what the model computes; take it out if it does not"
            )


def _is_off(name: str, value: object) -> bool:
    if name in FACTORS:
        return value is None or (value == 1 and value is not True)
    return (name in ABSENT and not value) or (name == "is_causal" and value is True)


def dense_fields(
    config: Section,
    *,
    eps: float,
    head_dim: int | None = None,
    key_value_heads: int | None = None,
    context: int = 2048,
) -> dict[str, Any]:
    """Sizes of a dense decoder, as fields of a `ModelConfig`.

    Args:
        config: without nulls that stand for defaults.
        eps, head_dim, key_value_heads, context: what transformers takes where the file names none; None: what
            follows from the other sizes.

    Raises:
        UserError: a size is missing, is no number, or does not fit the others.
    """
    vocab_size = config.whole("vocab_size")
    return {
        "num_layers": config.whole("num_hidden_layers", most=MOST_LAYERS),
        **_attention(config, head_dim, key_value_heads),
        "ffn_hidden_size": config.whole("intermediate_size"),
        "layernorm_epsilon": config.number("rms_norm_eps", eps),
        "init_method_std": config.number("initializer_range", 0.02, least=0),
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocabulary(vocab_size),
        "tied_embeddings": read_flag(config, "tie_word_embeddings"),
        "max_position_embeddings": config.whole("max_position_embeddings", context),
    }


def _attention(config: Section, head_dim: int | None, key_value_heads: int | None) -> dict[str, int]:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    groups = config.whole("num_key_value_heads", key_value_heads or heads)
    if heads % groups:
        raise config.refusal("num_key_value_heads", f"must divide the {heads} attention heads (num_attention_heads)")
    width = config.whole("head_dim", head_dim or max(hidden // heads, 1))  # rounded down, as transformers does
    if width % 2:
        raise UserError(f"{config.source}: heads are {width} wide (head_dim, or hidden_size / heads); must be even")
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups, "kv_channels": width}


def read_flag(config: Section, name: str, default: bool = False) -> bool:
    """
    Raises:
        UserError: neither true nor false.
    """
    value = config.values.get(name, default)
    if not isinstance(value, bool):
        raise config.refusal(name, "must be true or false")
    return value


def read_rope_type(section: Section, kinds: Collection[str]) -> str:
    """Of a rotary embedding's section, if it is one of `kinds`."""
    given = [section.values[key] for key in ("rope_type", "type") if section.values.get(key) is not None]
    kind = given[0] if given else "default"
    if kind not in kinds or given[1:] not in ([], [kind]):
        raise UserError(
            f"{section.source}: {section.prefix}rope_type={' and type='.join(map(shown, given))}: "
            f"must be {' or '.join(kinds)}"
        )
    return str(kind)


def refuse_unknown_rope(section: Section, kinds: Collection[str]) -> None:
    """Refuse a key of a rotary embedding that its kind does not have, unless its value is neutral."""
    kind = read_rope_type(section, kinds)
    for name, value in section.values.items():
        neutral = value is None or (type(value) in (int, float) and value == ROPE_NEUTRAL.get(name))
        if name not in ROPE_KEYS | SCALING_KEYS[kind] and not neutral:
            raise section.refusal(
                name,
                f"not read for rope_type {kind}, and may change what the model computes; take it out if it does not",
            )


def check_rope_theta(config: Section, section: Section, theta: float) -> None:
    """A section's base must be the file's own, where both are given: each transformers version reads another one."""
    if config.values.get("rope_theta") is not None and section.number("rope_theta", theta) != theta:
        raise section.refusal("rope_theta", f"must be the file's own rope_theta={theta:g}, or one of them alone")


def read_rope(
    config: Section,
    default_theta: float,
    kinds: Collection[str] = ("default",),
    read_scaling: Callable[[Section], Scaling] | None = None,
) -> tuple[float, Scaling | None]:
    """Base and scaling of a model whose layers all rotate alike, from any form that transformers has written.

    ``rope_theta`` with ``rope_scaling`` (4.57, and most released files), or ``rope_parameters`` (5.x). Two forms in one
    file must say the same, for each version reads another one.

    Args:
        default_theta: what transformers takes where a file names none.
        kinds: that the family has, "default" among them.
        read_scaling: of a section of another kind.

    Raises:
        UserError: another kind, unknown keys, numbers that are none, two forms that differ.
    """
    legacy, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    section = parameters if parameters.values else legacy
    theta = config.number("rope_theta", default_theta)
    for part in (legacy, parameters):
        refuse_unknown_rope(part, kinds)
        check_rope_theta(config, part, theta)

    def scaling_of(part: Section) -> Scaling | None:
        return None if read_scaling is None or read_rope_type(part, kinds) == "default" else read_scaling(part)

    scaling = scaling_of(section)
    if legacy.values and scaling_of(legacy) != scaling:
        raise UserError(f"{config.source}: rope_scaling and rope_parameters differ; must say the same, or one alone")
    return section.without_null("rope_theta").number("rope_theta", theta), scaling


def portable_rope(hf: dict[str, Any], theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """A config.json with what `read_rope` reads in both forms.

    Args:
        scaling: as a file says it, ``rope_type`` included; None: the default.
    """
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return hf | {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def rope_form(hf: dict[str, Any]) -> str:
    """In which of the forms that transformers has written a config.json says how positions are encoded."""
    if hf.get("rope_parameters"):
        return "rope_parameters, one kind of layers"
    if hf.get("rope_theta") or hf.get("rope_scaling"):
        return LEGACY_FORM
    return "none: the family's defaults"


def describe_dense(fields: dict[str, Any], hf: dict[str, Any], *more: tuple[str, str]) -> list[tuple[str, str]]:
    """Layers, rotary embedding and head of a model whose layers are all alike, as (label, text).

    Args:
        more: what the family says beyond that.
    """
    return [
        ("layers", f"{fields['num_layers']}"),
        ("rope", f"theta {fields['theta']:g}; {rope_form(hf)}"),
        *more,
        ("head", "the embedding" if fields["tied_embeddings"] else "its own"),
    ]


def shown(value: object, limit: int = 60) -> str:
    """A value as a message shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[:limit] + "..."
