"""Text to token ids and back, by the ``tokenizers`` library as transformers sets it up, or by sentencepiece."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sead.errors import UserError
from megatron_sead.files.names import TOKENIZER_SETTINGS
from megatron_sead.models.token_ids import NAMED_TOKENS, named_tokens, read_json
from megatron_sead.prompts.token_tables import load_pieces, merges_of

Messages = list[dict[str, str]]


class Codec(Protocol):
    """A tokenizer library's way from text to token ids and back, and all that decides it, for comparison."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]: ...

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encodes_as(self, other: Codec) -> bool:
        """Whether it is known that every text has the same ids by both."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def render(self, messages: Messages, template: str) -> str:
        """A chat template's text, with everything that transformers gives a template, up to where the answer begins."""
        ...

    def added(self) -> list[str]:
        """Tokens that the tokenizer itself would put around a text, and `encode` does not."""
        ...

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
        self.backend = backend
        self.eos_token_id: int | None = backend.eos_token_id
        self.pad_token_id: int | None = backend.pad_token_id
        template = backend.chat_template
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False)
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # which transformers fails on
            return []
        ids: list[list[int]] = self.backend(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def encodes_as(self, other: Codec) -> bool:
        return isinstance(other, HuggingFaceCodec) and _all_of(self.backend) == _all_of(other.backend)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, messages: Messages, template: str) -> str:
        # Not our own renderer: ids are those of `apply_chat_template`, whatever a template asks for
        return str(
            self.backend.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        )

    def added(self) -> list[str]:
        return [str(self.backend.convert_ids_to_tokens(token)) for token in self.backend.encode("")]

    def tokens(self) -> dict[str, int]:
        return dict(self.backend.get_vocab())

    def merges(self) -> list[str]:
        return merges_of(self._definition)

    def rules(self) -> dict[str, Any]:
        return {key: self._definition.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}

    @cached_property
    def _definition(self) -> dict[str, Any]:
        definition: dict[str, Any] = json.loads(self.backend.backend_tokenizer.to_str())
        return definition


def _all_of(backend: PreTrainedTokenizerFast) -> tuple[object, ...]:
    """All that ids depend on."""
    return type(backend), backend.split_special_tokens, backend.backend_tokenizer.to_str()


class SentencePieceCodec:
    """A bare sentencepiece model. Control pieces such as ``</s>`` in a chat template's text become their own ids.

    A template's ``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token`` are the model's own pieces.
    """

    def __init__(self, path: Path) -> None:
        self._model = load_pieces(path)
        self.path = path
        self._file = path.read_bytes()
        self._size = self._model.get_piece_size()
        model = self._model
        ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
        known = {name: token for name, token in ids.items() if token >= 0}
        self.special_tokens = {f"{name}_token": model.id_to_piece(token) for name, token in known.items()}
        self.eos_token_id: int | None = known.get("eos")
        self.pad_token_id: int | None = known.get("pad")
        self.chat_template: str | None = None

    @cached_property
    def _control(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self._size) if self._model.is_control(i)}

    def encode(self, text: str) -> list[int]:
        for piece, token in self._control.items():
            before, found, after = text.partition(piece)
            if found:
                return [*self.encode(before), token, *self.encode(after)]
        return list(self._model.encode(text)) if text else []

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encodes_as(self, other: Codec) -> bool:
        return isinstance(other, SentencePieceCodec) and other._file == self._file

    def decode(self, ids: Sequence[int]) -> str:
        # Rows that pad the model's embedding are no pieces, and a student may write them all the same
        return str(self._model.decode([i for i in ids if i < self._size and not self._model.is_control(i)]))

    def render(self, messages: Messages, template: str) -> str:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **self.special_tokens
        )
        return str(rendered[0])

    def added(self) -> list[str]:
        return []

    def tokens(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self._size)}

    def merges(self) -> list[str]:
        return [f"{self._model.id_to_piece(i)} {self._model.get_score(i)}" for i in range(self._size)]

    def rules(self) -> dict[str, Any]:
        return {"file": self._file}  # normalisation is compiled into it


def load_codec(place: Path, setting: str, model: Path) -> Codec:
    """The tokenizer of a directory as ``AutoTokenizer`` has it, or that of one file.

    Args:
        place: directory, JSON file of the ``tokenizers`` library, or sentencepiece file. A JSON file does not say which
            of its tokens begin and end a text; `model`'s own files do.
        setting: that names the place, for messages.
        model: directory of the model.

    Raises:
        UserError: no tokenizer is there, or none that can be read.
    """
    pieces = place if place.suffix == ".model" else place / "tokenizer.model"
    settled = (place / "tokenizer.json").is_file() or (place / TOKENIZER_SETTINGS).is_file()
    if pieces.is_file() and not settled:
        return SentencePieceCodec(pieces)
    codec = HuggingFaceCodec(_load_backend(place, setting, model))
    if place.is_file():
        codec.eos_token_id = None  # the file names none: what ends a response is for the model's own files to say
    return codec


def _load_backend(place: Path, setting: str, model: Path) -> PreTrainedTokenizerFast:
    try:
        if place.is_file():
            return _from_file(place, model)
        if not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise UserError(f"{setting}={place}: no tokenizer there: needs tokenizer.json or tokenizer.model")
        backend = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{setting}={place}: not a tokenizer: {one_line(error)}") from None
    if not isinstance(backend, PreTrainedTokenizerFast):
        raise UserError(f"{setting}={place}: {type(backend).__name__} has no tokenizer.json form, which is needed")
    return backend


def _from_file(file: Path, model: Path) -> PreTrainedTokenizerFast:
    ids = PreTrainedTokenizerFast(tokenizer_file=str(file)).get_vocab()
    texts = {token_id: token for token, token_id in ids.items()}
    named = read_json(model / "generation_config.json") | read_json(model / "config.json")
    tokens: dict[str, str] = {}
    for name in NAMED_TOKENS:
        value = named.get(f"{name}_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and first in texts:
            tokens[name] = texts[first]
    tokens |= {name: token for name, token in named_tokens(model).items() if token in ids}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **tokens)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
