"""Do the models' tokenizers, stop tokens and vocabularies fit each other? Reads their files alone; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sead.config.run import ModelSettings, RunConfig
from megatron_sead.errors import UserError
from megatron_sead.files.names import TOKENIZER_SETTINGS
from megatron_sead.models.token_ids import (
    embedding_rows,
    named_tokens,
    pad_token_id,
    read_json,
    require_rows,
    require_same_rows,
    require_token_ids,
    stop_token_ids,
    token_text,
)


def tokenizer_problems(config: RunConfig) -> list[str]:
    """A directory with tokenizer.json or a sentencepiece model, or such a file itself; the same tokens for both,
    a row of both embeddings for each."""
    problems, found = [], []
    for model, role in ((config.student, "student"), (config.teacher, "teacher")):
        if model.chat_template is not None and not model.chat_template.is_file():
            problems.append(f"{role}.chat_template={model.chat_template}: cannot be read: no such file")
        place = model.tokenizer or model.path
        setting = f"{role}.tokenizer" if model.tokenizer else f"{role}.path"
        candidates = [place] if place.is_file() else [place / "tokenizer.json", place / "tokenizer.model"]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            problems.append(f"{setting}={place}: no tokenizer there: needs tokenizer.json or tokenizer.model")
            continue
        try:
            found.append(_tokens_of(file))
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{file}: not a valid tokenizer: must be JSON with a 'model' that has a 'vocab'")
            continue
        problems += _unknown_tokens(model, role, place, file)
    if len(found) == 2 and found[0] != found[1]:
        problems.append(
            f"teacher {config.teacher.tokenizer or config.teacher.path} and student "
            f"{config.student.tokenizer or config.student.path} have different tokenizers: tokens, merges and added "
            "tokens must be the same"
        )
    try:
        require_same_rows(config.student.path, config.teacher.path)
    except UserError as error:
        problems.append(str(error))
    return problems


def _unknown_tokens(model: ModelSettings, role: str, place: Path, file: Path) -> list[str]:
    """What the run would find when it loads the tokenizer: tokens that the model has no row for."""
    try:
        require_token_ids(model.path)
        stop, source = stop_token_ids(model, role) or ((), "")
        pad_token_id(model)
        ids = _ids_of(file, place)
        require_rows(ids, model, role, place)
    except UserError as error:
        return [str(error)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [
            f"{place / TOKENIZER_SETTINGS}: not the settings of a tokenizer: its special or added tokens are no tokens"
        ]
    rows, known = embedding_rows(model.path), set(ids.values())
    chosen = model.stop_token_ids is not None
    unknown = [t for t in stop if t not in known and (chosen or (rows is not None and t >= rows))]
    return [f"{source}: stop token {unknown[0]} is not among the {len(known)} tokens of {place}"] if unknown else []


def _ids_of(file: Path, place: Path) -> dict[str, int]:
    """Every token and its id, with those that transformers adds because the directory's other files name them."""
    ids = _own_ids(json.loads(file.read_text(encoding="utf-8"))) if file.suffix == ".json" else _pieces(file)
    if place.is_dir():
        settings = read_json(place / TOKENIZER_SETTINGS)
        placed = settings.get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(token_id) for token_id, token in placed.items()}
        extra = [settings.get(name) for name in ("extra_special_tokens", "additional_special_tokens")]
        listed: list[Any] = [token for tokens in extra if isinstance(tokens, list) for token in tokens]
        for token in (*named_tokens(place).values(), *filter(None, map(token_text, listed))):
            ids.setdefault(token, max(ids.values(), default=-1) + 1)
    return ids


def _own_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # a unigram model: [token, score], the place is the id
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return dict(vocabulary) | added


def _pieces(file: Path) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: not a sentencepiece model: {' '.join(str(error).split())}") from None
    return {model.id_to_piece(token): token for token in range(model.get_piece_size())}


def _tokens_of(file: Path) -> object:
    """What must be equal. Versions write merges as "a b" or ["a", "b"], and added tokens in one place or in two."""
    if file.suffix != ".json":
        return file.read_bytes()
    values = json.loads(file.read_text(encoding="utf-8"))
    tokens = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    vocabulary = values["model"]["vocab"]
    if isinstance(vocabulary, list):  # a unigram model: [token, score], the place is the id
        return tokens, vocabulary
    merges = values["model"].get("merges") or []
    return tokens | vocabulary, [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
