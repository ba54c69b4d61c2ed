"""Prompts: sets of problems, the models' tokenizers, and packing of rollouts into micro-batches."""

from megatron_sead.prompts.dataset import Prompt, load_prompts
from megatron_sead.prompts.packing import MicroBatch, TokenView, pack
from megatron_sead.prompts.pair import PairReport, check_pair
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer

__all__ = [
    "MicroBatch",
    "ModelTokenizer",
    "PairReport",
    "Prompt",
    "TokenView",
    "check_pair",
    "load_prompts",
    "load_tokenizer",
    "pack",
]
