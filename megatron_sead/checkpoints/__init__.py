"""Saving and resuming a run; a trained model as a Hugging Face directory."""

from megatron_sead.checkpoints.huggingface import verify_huggingface_directory, write_huggingface_directory
from megatron_sead.checkpoints.store import CheckpointStore

__all__ = ["CheckpointStore", "verify_huggingface_directory", "write_huggingface_directory"]
