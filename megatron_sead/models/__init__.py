"""What a model is, in Megatron-Core. Hugging Face directories in and out."""

from megatron_sead.models.builder import build_model, model_config, read_hf_config
from megatron_sead.models.huggingface import iterate_huggingface_weights, load_huggingface_weights, unwrap
from megatron_sead.models.parallel import ParallelContext

__all__ = [
    "ParallelContext",
    "build_model",
    "iterate_huggingface_weights",
    "load_huggingface_weights",
    "model_config",
    "read_hf_config",
    "unwrap",
]
