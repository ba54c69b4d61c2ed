"""What a tokenizer consists of, from its files or as it was loaded, and whether two are the same. No torch here.

Student and teacher are compared position by position over one vocabulary, so other tokens make nonsense of every
divergence. A check before the run asks with what the files say, the run itself with the loaded tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sead.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True)
class TokenTables:
    """One model's tokenizer."""

    place: Path
    tokens: Mapping[str, int]  # every token, added ones included, and its id
    merges: Sequence[str] = ()  # BPE merges in order of rank, or pieces with their scores
    rules: Mapping[str, Any] = field(default_factory=dict)  # how text is split before merging; empty: not read


def tokens_of(definition: dict[str, Any]) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json, whatever the version that wrote it."""
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):  # a unigram model: [token, score], the place is the id
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary) | {token["content"]: token["id"] for token in definition.get("added_tokens") or []}


def merges_of(definition: dict[str, Any]) -> list[str]:
    """BPE merges in order of rank, which versions write as "a b" or ["a", "b"]; a unigram model's pieces and scores."""
    model = definition["model"]
    if "merges" in model:
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"] or ()]
    vocabulary = model.get("vocab")
    return [f"{piece} {score}" for piece, score in vocabulary] if isinstance(vocabulary, list) else []


def load_pieces(file: Path) -> SentencePieceProcessor:
    """A sentencepiece model.

    Raises:
        UserError: it is none.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a sentencepiece model: {reason}") from None


def require_same_tokenizer(student: TokenTables, teacher: TokenTables) -> None:
    """Compare two tokenizers.

    Raises:
        UserError: names the first token, merge or rule that differs.
    """
    where = f"student {student.place} and teacher {teacher.place} have different tokenizers"
    if student.tokens != teacher.tokens:
        ours, theirs = _by_id(student.tokens), _by_id(teacher.tokens)
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise UserError(
            f"{where}: token {token} is {shown(ours.get(token))} for the student and {shown(theirs.get(token))} for "
            f"the teacher ({len(ours)} and {len(theirs)} tokens)"
        )
    for rank, (our_merge, their_merge) in enumerate(zip_longest(student.merges, teacher.merges)):
        if our_merge != their_merge:
            raise UserError(
                f"{where}: merge {rank} is {shown(our_merge)} for the student and {shown(their_merge)} for the teacher"
            )
    for name in student.rules.keys() | teacher.rules.keys():
        if student.rules.get(name) != teacher.rules.get(name):
            raise UserError(f"{where}: same tokens and merges, but not the same {name}, so text is split differently")


def _by_id(tokens: Mapping[str, int]) -> dict[int, str]:
    return {token_id: token for token, token_id in tokens.items()}


def shown(value: str | None) -> str:
    """A text in quotes, as a message shows it."""
    return "nothing" if value is None else repr(value)
