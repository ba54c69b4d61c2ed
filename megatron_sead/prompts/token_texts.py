"""The text that each token stands for, for people: with its space, special tokens by name, characters whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatron_sead.prompts.tokenizer import ModelTokenizer

PART = "\ufffd"  # how decoders write bytes that are no whole character
MOST_PARTS = 8  # tokens that may share characters


class TokenTexts:
    """Of one tokenizer. A token's text is decoded behind another's: at the beginning of a text some decoders drop a
    space."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")
        self._offset = len(tokenizer.decode(self._before))
        self.of = cache(self._of)

    def of_all(self, ids: Sequence[int]) -> list[str]:
        """One text a token; together they are the text. Where tokens share a character it stands with the first of
        them, and the others' texts are empty."""
        texts, place = [self.of(token) for token in ids], 0
        while place < len(ids):
            count = 1 if PART not in texts[place] else self._sharing(ids[place : place + MOST_PARTS])
            if count > 1:
                texts[place : place + count] = [self._decoded(ids[place : place + count]), *[""] * (count - 1)]
            place += count
        return texts

    def _sharing(self, ids: Sequence[int]) -> int:
        """How many of the tokens make whole characters together; 1: they do not."""
        return next((count for count in range(2, len(ids) + 1) if PART not in self._decoded(ids[:count])), 1)

    def _of(self, token: int) -> str:
        return self._decoded([token]) or self._tokenizer.token_names.get(token, f"<{token}>")

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids])[self._offset :]
