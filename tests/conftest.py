"""What several test folders share: a tiny random OLMo-3 with a tokenizer, as a Hugging Face directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast

from tests.distributed.ranks import RankPools

SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "0123456789+-*=;#().,\\{} \nabcdefghijklmnopqrstuvwxyz"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every character a token, a few merges; pad 0, end of text 1, end of turn 3."""
    characters = [*dict.fromkeys(CHARACTERS), *"ABC"]
    merges = [("b", "o"), ("bo", "x"), ("1", "0")]
    pieces = [*SPECIAL, *characters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def make_olmo3(directory: Path, *, seed: int = 0, **changes: object) -> Path:
    """Three layers (two sliding over 6 tokens, one full with YaRN from 16), head size 32, random fp32 weights."""
    tokenizer = make_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,  # wide enough that tokens differ in probability
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = Olmo3ForCausalLM(Olmo3Config(**(values | changes)))
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pools() -> Iterator[RankPools]:
    """Real ranks, shared by all tests of this process."""
    pools = RankPools()
    yield pools
    pools.stop()


@pytest.fixture(scope="session")
def tiny_olmo3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random OLMo-3 with its tokenizer; stops on tokens 1 and 3."""
    return make_olmo3(tmp_path_factory.mktemp("olmo3"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real benchmark files, where MEGATRON_SEAD_DATA says."""
    folder = os.environ.get("MEGATRON_SEAD_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs MEGATRON_SEAD_DATA, the folder with the benchmark files")
    return Path(folder)
