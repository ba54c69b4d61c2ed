"""A model's stop tokens, padding token and embedding rows, by its own files.

No torch here: ``--check`` asks before a run, and the run asks again when it loads the tokenizer itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.files.names import TOKENIZER_SETTINGS

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file.

    Raises:
        UserError: no JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values


def require_token_ids(model: Path) -> None:
    """A model's configuration names tokens by number, for transformers reads these fields whatever the settings say.

    Raises:
        UserError: names the first field that holds something else.
    """
    fields = (
        ("config.json", ("bos_token_id", "eos_token_id", "pad_token_id")),
        ("generation_config.json", ("bos_token_id", "pad_token_id")),  # its eos_token_id matters where it is used
    )
    for name, keys in fields:
        values = read_json(model / name)
        for key in keys:
            value = values.get(key)
            ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in ids):
                raise UserError(
                    f"{model / name}: {key} {value!r} is not among the model's tokens: must be a token id, a whole "
                    "number from 0, or null"
                )


def embedding_rows(model: Path) -> int | None:
    """vocab_size of a model's config.json, whose tokens are the numbers below it. None where the file does not say,
    which is told where the model is built."""
    rows = read_json(model / "config.json").get("vocab_size")
    return rows if isinstance(rows, int) and not isinstance(rows, bool) else None


def named_tokens(directory: Path) -> dict[str, str]:
    """The text of each special token that a tokenizer's directory names: ``{"eos_token": "</s>"}``.

    As transformers reads it: special_tokens_map.json counts where tokenizer_config.json has no added_tokens_decoder.
    """
    named = read_json(directory / TOKENIZER_SETTINGS)
    if "added_tokens_decoder" not in named:
        named |= read_json(directory / "special_tokens_map.json")
    texts = {name: token_text(named.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}


def portable_tokenizer(settings: Any) -> Any:
    """tokenizer_config.json in words that transformers 4.57 knows too: 5.x reads the older ones of its own as well."""
    if not isinstance(settings, dict):
        return settings
    portable = dict(settings)
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(portable.get("extra_special_tokens"), list) and "additional_special_tokens" not in portable:
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")  # 4.57 wants a dictionary there
    return portable


def token_text(token: object) -> str | None:
    """Of a token as a tokenizer's files have it: its text, or a dictionary with its ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def stop_token_ids(settings: ModelSettings, role: str) -> tuple[tuple[int, ...], str] | None:
    """The tokens that end a response, by the settings, generation_config.json or config.json, whichever comes first,
    and the setting or file that names them. None: none does, and it is the tokenizer's own.

    Raises:
        UserError: something else than token ids.
    """
    files = (settings.path / "generation_config.json", settings.path / "config.json")
    candidates: list[tuple[Any, str]] = [
        (settings.stop_token_ids, f"{role}.stop_token_ids"),
        *((read_json(file).get("eos_token_id"), str(file)) for file in files),
    ]
    for value, source in candidates:
        ids = value if isinstance(value, list) else [value]
        if value is None or not ids:
            continue
        if wrong := [token for token in ids if not _is_id(token)]:
            what = f"stop token {wrong[0]!r}" if source.endswith("stop_token_ids") else f"eos_token_id {value!r}"
            raise UserError(
                f"{source}: {what} is not among the tokens: must be a token id, a whole number from 0, or a list of "
                f"them; {role}.stop_token_ids says others"
            )
        return tuple(dict.fromkeys(ids)), source
    return None


def pad_token_id(settings: ModelSettings) -> int | None:
    """config.json's token for positions that are masked; -1 is some files' word for none.

    Raises:
        UserError: no token id, or one without a row in the embedding: transformers would not build it.
    """
    file, rows = settings.path / "config.json", embedding_rows(settings.path)
    named = read_json(file).get("pad_token_id")
    if named is None or named == -1:
        return None
    if not _is_id(named) or (rows is not None and named >= rows):
        valid = "a whole number from 0" if rows is None else f"from 0 to {rows - 1} (vocab_size is {rows})"
        raise UserError(f"{file}: pad_token_id {named!r} is not among the model's tokens: must be {valid}, or null")
    return int(named)


def require_rows(tokens: Mapping[str, int], settings: ModelSettings, role: str, tokenizer: Path) -> None:
    """Every token that the tokenizer can give has a row in the model's embedding.

    Args:
        tokens: each token's text and id.

    Raises:
        UserError: names the first token that has none.
    """
    rows = embedding_rows(settings.path)
    beyond = sorted((token_id, token) for token, token_id in tokens.items() if rows is not None and token_id >= rows)
    if beyond:
        token_id, token = beyond[0]
        more = f", and {len(beyond) - 1} more beyond it" if len(beyond) > 1 else ""
        raise UserError(
            f"{tokenizer}: token {token_id} {token!r} is not among the model's {rows} (vocab_size of "
            f"{settings.path / 'config.json'}){more}; resize the model's embedding for it, or set {role}.tokenizer to "
            "the tokenizer that the model was trained with"
        )


def require_same_rows(student: Path, teacher: Path) -> None:
    """Both models' logits have one width.

    Raises:
        UserError: names both.
    """
    ours, theirs = embedding_rows(student), embedding_rows(teacher)
    if ours is not None and theirs is not None and ours != theirs:
        raise UserError(
            f"vocab_size is {ours} in {student} and {theirs} in {teacher}; "
            "student and teacher must have the same vocabulary"
        )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
