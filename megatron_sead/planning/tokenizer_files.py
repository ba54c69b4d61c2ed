"""Do the models' tokenizers, stop tokens and vocabularies fit each other? Reads their files alone; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sead.config.run import ModelSettings, RunConfig
from megatron_sead.errors import UserError, kept
from megatron_sead.files.names import TOKENIZER_SETTINGS, no_directory
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
from megatron_sead.prompts.token_tables import (
    TokenTables,
    load_pieces,
    merges_of,
    require_same_tokenizer,
    tokens_of,
)


def tokenizer_problems(config: RunConfig) -> list[str]:
    """What is wrong with the tokenizers.

    Each is a directory with tokenizer.json or a sentencepiece model, or such a file itself. Both must have the same
    tokens, and both embeddings a row for each.
    """
    problems, found = [], []
    for model, role in ((config.student, "student"), (config.teacher, "teacher")):
        if model.chat_template is not None and not model.chat_template.is_file():
            problems.append(f"{role}.chat_template={model.chat_template}: cannot be read: no such file")
        place = model.tokenizer or model.path
        setting = f"{role}.tokenizer" if model.tokenizer else f"{role}.path"
        candidates = [place] if place.is_file() else [place / "tokenizer.json", place / "tokenizer.model"]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None and place == model.path and not place.is_dir():
            continue  # told as that
        if file is None:
            problems.append(f"{setting}={place}: no tokenizer there: needs tokenizer.json or tokenizer.model")
            continue
        try:
            tables = _tables(file, place)
        except UserError as error:
            problems.append(str(error))
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"{file}: not a valid tokenizer: must be JSON with a 'model' that has a 'vocab'")
            continue
        found.append(tables)
        problems += _unknown_tokens(model, role, tables)
    with kept(problems):
        if len(found) == 2:
            require_same_tokenizer(*found)
    with kept(problems):
        require_same_rows(config.student.path, config.teacher.path)
    return problems


def require_model_directory(model: ModelSettings, role: str) -> None:
    """
    Raises:
        UserError: there is no such directory.
    """
    if not model.path.is_dir():
        raise UserError(
            f"{role}.path={model.path}: {no_directory(model.path)}; it is to hold a model in Hugging Face format"
        )


def _unknown_tokens(model: ModelSettings, role: str, tables: TokenTables) -> list[str]:
    """What the run would find when it loads the tokenizer: tokens that the model has no row for."""
    place = tables.place
    try:
        require_token_ids(model.path)
        stop, source = stop_token_ids(model, role) or ((), "")
        pad_token_id(model)
        ids = _all_ids(tables)
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


def _tables(file: Path, place: Path) -> TokenTables:
    """What the file says. Its rules are left to the run: transformers may set up others for the tokenizer's class."""
    if file.suffix != ".json":
        pieces = load_pieces(file)
        tokens = {pieces.id_to_piece(token): token for token in range(pieces.get_piece_size())}
        return TokenTables(place, tokens, rules={"file": file.read_bytes()})
    definition = json.loads(file.read_text(encoding="utf-8"))
    return TokenTables(place, tokens_of(definition), merges_of(definition))


def _all_ids(tables: TokenTables) -> dict[str, int]:
    """Every token and its id, with those that transformers adds because the directory's other files name them."""
    ids, place = dict(tables.tokens), tables.place
    if place.is_dir():
        settings = read_json(place / TOKENIZER_SETTINGS)
        placed = settings.get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(token_id) for token_id, token in placed.items()}
        extra = [settings.get(name) for name in ("extra_special_tokens", "additional_special_tokens")]
        listed: list[Any] = [token for tokens in extra if isinstance(tokens, list) for token in tokens]
        for token in (*named_tokens(place).values(), *filter(None, map(token_text, listed))):
            ids.setdefault(token, max(ids.values(), default=-1) + 1)
    return ids
