"""Losses of methods that SEAD is compared with, where two weights of the exact divergences do not express them."""

from megatron_sead.distillation.baselines.generalized_jsd import generalized_jsd
from megatron_sead.distillation.baselines.sampled_token import sampled_token_loss
from megatron_sead.distillation.baselines.top_k import top_k_divergence, top_k_entropy

__all__ = ["generalized_jsd", "sampled_token_loss", "top_k_divergence", "top_k_entropy"]
