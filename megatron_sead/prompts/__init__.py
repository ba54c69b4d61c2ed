"""Prompts: sets of problems, the models' tokenizers, and packing of rollouts into micro-batches.

What stands here is imported when it is asked for: a check of a prompt set (`problems`, `rows`) needs no torch, which
packing does, and no transformers, which tokenizers do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    for module in ("dataset", "packing", "pair", "tokenizer") if name in __all__ else ():
        home = import_module(f"{__name__}.{module}")
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
