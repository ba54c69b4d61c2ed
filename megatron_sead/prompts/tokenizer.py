"""A model's way with words: its tokenizer, its chat template and system prompt, and the tokens that it stops on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sead.config import ModelSettings
from megatron_sead.errors import UserError


class Codec(Protocol):
    """Text to token ids and back, with everything that decides it laid open for comparison."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def tokens(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        ...

    def merges(self) -> list[str]:
        """BPE merges in order of rank, or the pieces' scores; empty where the model has neither."""
        ...

    def rules(self) -> dict[str, Any]:
        """How text is normalised and split before merging, and what is added around it."""
        ...


class HuggingFaceCodec:
    """A tokenizer of the ``tokenizers`` library. Adds no special tokens: what a prompt begins with is in its text."""

    def __init__(self, backend: PreTrainedTokenizerFast) -> None:
        self._backend = backend
        self.eos_token_id: int | None = backend.eos_token_id
        self.pad_token_id: int | None = backend.pad_token_id
        template = backend.chat_template
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def tokens(self) -> dict[str, int]:
        return dict(self._backend.get_vocab())

    def merges(self) -> list[str]:
        model = self._definition["model"]
        if "merges" in model:
            return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        vocabulary = model.get("vocab")
        return [f"{piece} {score}" for piece, score in vocabulary] if isinstance(vocabulary, list) else []

    def rules(self) -> dict[str, Any]:
        return {key: self._definition.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}

    @cached_property
    def _definition(self) -> dict[str, Any]:
        definition: dict[str, Any] = json.loads(self._backend.backend_tokenizer.to_str())
        return definition


class SentencePieceCodec:
    """A bare sentencepiece model. Control pieces such as ``</s>`` in a chat template's text become their own ids."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a sentencepiece model: {' '.join(str(error).split())}") from None
        self._file = path.read_bytes()
        self.eos_token_id: int | None = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.pad_token_id: int | None = self._model.pad_id() if self._model.pad_id() >= 0 else None
        self.chat_template: str | None = None

    @cached_property
    def _control(self) -> dict[str, int]:
        ids = range(self._model.get_piece_size())
        return {self._model.id_to_piece(i): i for i in ids if self._model.is_control(i)}

    def encode(self, text: str) -> list[int]:
        for piece, token in self._control.items():
            before, found, after = text.partition(piece)
            if found:
                return [*self.encode(before), token, *self.encode(after)]
        return list(self._model.encode(text)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([i for i in ids if not self._model.is_control(i)]))

    def tokens(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self._model.get_piece_size())}

    def merges(self) -> list[str]:
        return [f"{self._model.id_to_piece(i)} {self._model.get_score(i)}" for i in range(self._model.get_piece_size())]

    def rules(self) -> dict[str, Any]:
        return {"file": self._file}  # normalisation is compiled into it


@dataclass(frozen=True)
class ModelTokenizer:
    """One model's tokenizer with what the run's settings and the model's own files say about speaking to it."""

    role: str  # student or teacher: the group of settings, for messages
    path: Path
    codec: Codec
    stop_token_ids: tuple[int, ...]
    stop_source: str  # the setting or file that names them
    pad_token_id: int
    eos_token: str
    chat_template: str | None
    template_source: str
    system_prompt: str | None
    context_length: int | None  # max_position_embeddings of the model

    @cached_property
    def token_names(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self.codec.tokens().items()}

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.token_names) + 1

    def encode(self, text: str) -> tuple[int, ...]:
        """Text as it is: no token is added before or after it."""
        return tuple(self.codec.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self.codec.decode(ids)

    def render(self, text: str) -> str:
        """A user's turn in the chat template, up to where the model's answer begins.

        Raises:
            UserError: the model has no chat template, or the template fails.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.role}: {self.path} has no chat template; set {self.role}.chat_template to a Jinja file, "
                "or prompts.template=plain"
            )
        messages = [{"role": "user", "content": text}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                eos_token=self.eos_token,
                bos_token="",
                pad_token=self.token_names.get(self.pad_token_id, ""),
            )
        except Exception as error:  # whatever a user's template raises
            raise UserError(f"{self.template_source}: the chat template fails: {_one_line(error)}") from None
        return str(rendered[0])


def load_tokenizer(settings: ModelSettings, role: str) -> ModelTokenizer:
    """Read a model's tokenizer, and how it is spoken to.

    The tokenizer is a Hugging Face directory, a JSON file of the ``tokenizers`` library, or a sentencepiece file.
    Stop tokens come from the settings, else generation_config.json, else config.json, else the tokenizer's
    end-of-sequence token. A directory's ``chat_template.jinja`` wins over the field in tokenizer_config.json.

    Args:
        role: "student" or "teacher", for messages.

    Raises:
        UserError: nothing to read, or nothing that says where a response ends.
    """
    place = settings.tokenizer or settings.path
    codec = _load_codec(place, f"{role}.tokenizer" if settings.tokenizer else f"{role}.path")
    names = {token_id: token for token, token_id in codec.tokens().items()}
    config = _read_json(settings.path / "config.json")
    stop, stop_source = _stop_tokens(settings, role, config, codec.eos_token_id, place)
    if unknown := [token for token in stop if token not in names]:
        raise UserError(f"{stop_source}: stop token {unknown[0]} is not among the {len(names)} tokens of {place}")
    pad = next((p for p in (codec.pad_token_id, config.get("pad_token_id")) if p is not None), stop[0])
    template, template_source = _chat_template(settings, role, codec, place)
    return ModelTokenizer(
        role=role,
        path=place,
        codec=codec,
        stop_token_ids=stop,
        stop_source=stop_source,
        pad_token_id=pad,
        eos_token=names[stop[0] if codec.eos_token_id is None else codec.eos_token_id],
        chat_template=template,
        template_source=template_source,
        system_prompt=settings.system_prompt,
        context_length=config.get("max_position_embeddings"),
    )


def _load_codec(place: Path, setting: str) -> Codec:
    model_file = place if place.suffix == ".model" else place / "tokenizer.model"
    if model_file.is_file() and not (place / "tokenizer.json").is_file():
        return SentencePieceCodec(model_file)
    return HuggingFaceCodec(_load_backend(place, setting))


def _load_backend(place: Path, setting: str) -> PreTrainedTokenizerFast:
    try:
        if place.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(place))
        if not (place / "tokenizer.json").is_file():
            raise UserError(f"{setting}={place}: no tokenizer there: needs tokenizer.json or tokenizer.model")
        backend = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{setting}={place}: not a tokenizer: {_one_line(error)}") from None
    if not isinstance(backend, PreTrainedTokenizerFast):
        raise UserError(f"{setting}={place}: {type(backend).__name__} has no tokenizer.json form, which is needed")
    return backend


def _stop_tokens(
    settings: ModelSettings, role: str, config: dict[str, Any], own_eos: int | None, place: Path
) -> tuple[tuple[int, ...], str]:
    generation = _read_json(settings.path / "generation_config.json")
    candidates: list[tuple[Any, str]] = [
        (settings.stop_token_ids, f"{role}.stop_token_ids"),
        (generation.get("eos_token_id"), f"{settings.path / 'generation_config.json'}"),
        (config.get("eos_token_id"), f"{settings.path / 'config.json'}"),
        (own_eos, f"{place}"),
    ]
    for value, source in candidates:
        ids = value if isinstance(value, list) else [value]
        if value is not None and ids:
            return tuple(dict.fromkeys(int(token) for token in ids)), source
    raise UserError(
        f"{role}: neither {settings.path} nor {place} says where a response ends; set {role}.stop_token_ids"
    )


def _chat_template(settings: ModelSettings, role: str, codec: Codec, place: Path) -> tuple[str | None, str]:
    """The template and where it is from. A tokenizer file of its own leaves the model directory's template in force."""
    chosen = settings.chat_template
    if chosen is not None:
        try:
            return chosen.read_text(encoding="utf-8"), f"{role}.chat_template={chosen}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{role}.chat_template={chosen}: cannot be read: {_one_line(error)}") from None
    for folder in (place, settings.path):
        file = folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8"), str(file)
    if codec.chat_template is not None:
        return codec.chat_template, str(place)
    file = settings.path / "tokenizer_config.json"
    template = _read_json(file).get("chat_template")
    return (template, str(file)) if isinstance(template, str) else (None, str(settings.path))


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
