"""Tokens as people read them: together they are the text, whatever the tokenizer cuts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from megatron_sead.config.run import ModelSettings
from megatron_sead.prompts.token_texts import TokenTexts
from megatron_sead.prompts.tokenizer import load_tokenizer

SPECIAL = ("<|pad|>", "<|end|>")


def texts_of(tokenizer: Tokenizer, tiny_olmo3: Path, folder: Path) -> TokenTexts:
    tokenizer.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(
        folder
    )
    model = shutil.copytree(tiny_olmo3, folder.with_name("model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 20_000}))
    return TokenTexts(load_tokenizer(ModelSettings(path=model, tokenizer=folder), "student"))


def bytes_only() -> Tokenizer:
    """Every byte a token, but for the first two of an emoji, which are one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first, second = (pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("👩")[0][0][i] for i in (0, 1))
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet, first + second))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[(first, second)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", ["a b", "👩\u200d🚀 x", "é", "مرحبا", "长", " \n\t", ""])
def test_texts_of_bytes_are_whole_characters(tiny_olmo3: Path, tmp_path: Path, text: str) -> None:
    tokenizer = bytes_only()
    texts = texts_of(tokenizer, tiny_olmo3, tmp_path / "t")
    ids = tokenizer.encode(text).ids
    found = texts.of_all(ids)
    assert "".join(found) == text and len(found) == len(ids)
    assert [len(part) for part in found if part] == [1] * len(text)


def test_bytes_that_make_no_character_stay_marked_and_what_follows_is_whole(tiny_olmo3: Path, tmp_path: Path) -> None:
    tokenizer = bytes_only()
    ids = tokenizer.encode("é").ids
    found = texts_of(tokenizer, tiny_olmo3, tmp_path / "t").of_all([ids[0], *tokenizer.encode("ab").ids, *ids])
    assert found == ["\ufffd", "a", "b", "é", ""]


def test_special_tokens_are_named_and_spaces_are_kept(tiny_olmo3: Path, tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("▁b", -1.0), ("b", -2.0), ("▁", -3.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    texts = texts_of(tokenizer, tiny_olmo3, tmp_path / "t")
    assert texts.of_all(tokenizer.encode("a bb<|end|>").ids) == [" a", " b", "b", "<|end|>"]
    assert texts.of(10_000) == "<10000>"
