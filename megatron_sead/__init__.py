"""SEAD, competence-aware on-policy distillation, for large models on Megatron-Core."""

__version__ = "0.1.0"
