"""What a config.json of Llama says. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sead.models.hf_config import NULLABLE, Section, dense_fields, read_rope, refuse_unknown

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
DEFAULT_THETA = 10000.0
KINDS = ("default", "llama3")  # of rotary embeddings


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow rotations are slowed by the factor, fast ones kept, a ramp of wavelengths between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


def llama_fields(config: Section) -> dict[str, Any]:
    """Fields of a `LlamaConfig`.

    Raises:
        UserError: a field is missing, has a value that this family does not have, or is unknown and may change what
            the model computes.
    """
    config = config.without_null(*NULLABLE)
    # The first says who made it, the second that rotated pairs are halves apart, as they are here
    refuse_unknown(config, ARCHITECTURES["llama"], expected={"is_llama_config": True, "rope_interleaved": False})
    theta, scaling = read_rope(config, DEFAULT_THETA, KINDS, _scaling)
    return dense_fields(config, eps=1e-6) | {"theta": theta, "scaling": scaling}


def _scaling(section: Section) -> Llama3Scaling:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.refusal("low_freq_factor", f"must be less than high_freq_factor={high:g}")
    return Llama3Scaling(
        factor=section.number("factor", least=1),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_length=section.whole("original_max_position_embeddings"),
    )
