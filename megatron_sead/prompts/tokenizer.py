"""A model's tokenizer, its chat template and system prompt, and the tokens that it stops on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.files.names import TOKENIZER_SETTINGS
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.token_ids import pad_token_id, read_json, require_rows, require_token_ids, stop_token_ids
from megatron_sead.prompts.codecs import Codec, HuggingFaceCodec, Messages, load_codec, one_line
from megatron_sead.prompts.messages import Conversation, Turn
from megatron_sead.prompts.token_tables import TokenTables

PROBE = "What is 1+1?"


class TextsOnDemand(Sequence[str]):
    """Texts of token ids, each decoded when it is asked for: ranks that share texts decode their own alone."""

    def __init__(self, ids: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._ids, self._decode = ids, decode

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._decode(ids) for ids in self._ids[index]]
        return self._decode(self._ids[index])


@dataclass(frozen=True)
class ModelTokenizer:
    """One model's tokenizer, with the prompts and stop tokens that the run's settings and the model's files name."""

    role: str  # student or teacher: the group of settings, for messages
    path: Path
    codec: Codec
    stop_token_ids: tuple[int, ...]
    stop_source: str  # the setting or file that names them
    pad_token_id: int
    chat_template: str | None
    template_source: str
    system_prompt: str | None
    context_length: int | None  # max_position_embeddings of the model

    @cached_property
    def token_names(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self.codec.tokens().items()}

    @property
    def tables(self) -> TokenTables:
        """What is compared with another model's tokenizer."""
        return TokenTables(self.path, self.codec.tokens(), self.codec.merges(), self.codec.rules())

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.token_names) + 1

    def encode(self, text: str) -> tuple[int, ...]:
        """Text as it is: no token is added before or after it, such as a BOS; a chat template's text has them in it."""
        return tuple(self.codec.encode(text))

    def encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """`encode` of each, in less time."""
        return [tuple(ids) for ids in self.codec.encode_all(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self.codec.decode(ids)

    def render(self, prompt: str | Conversation) -> str:
        """A user's turn, or a conversation, in the chat template, up to where the model's answer begins.

        The text's tokens are those of transformers' ``apply_chat_template(messages, add_generation_prompt=True)``.

        Raises:
            UserError: the model has no chat template, or the template fails, or leaves out what it is given; a
                conversation has a system message other than the settings' system_prompt.
        """
        turns = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        system = self.system_prompt
        if turns[0].role == "system":
            self._require_same_system(turns[0].content)
            system, turns = turns[0].content, turns[1:]
        rendered = self._render(_messages(turns, system), self._usable_template)
        if isinstance(prompt, str) or len(prompt) == 1:
            return rendered
        if lost := next((t for t in prompt if t.role != "assistant" and t.content.strip() not in rendered), None):
            raise UserError(
                f"{self.template_source}: the chat template leaves out the {lost.role}'s message "
                f"{lost.content.strip()[:40]!r}; set {self.role}.chat_template to another"
            )
        return rendered

    def is_rendered(self, turns: Conversation) -> bool:
        """Does a message begin or end as the chat template's own text does? It would go through the template again."""
        beginnings, ends = self._template_edges
        texts = [turn.content.strip() for turn in turns]
        return any(text.startswith(beginnings) or text.endswith(ends) for text in texts)

    @cached_property
    def _template_edges(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a rendered text begins with, special tokens or what stands before the user's words; and its end."""
        before, _, after = self._render(_asked(PROBE, self.system_prompt), self._usable_template).partition(PROBE)
        special = [self.token_names[token] for token in self.encode(before) if not self.decode([token])]
        opening = before.strip().rpartition("\n")[2]
        for token in dict.fromkeys(special):
            opening = opening.removeprefix(token)
        return (*dict.fromkeys(special), *_marks(opening)), _marks(after.strip())

    def _require_same_system(self, own: str) -> None:
        """A conversation's own system message stands in the place of the settings', which must not say otherwise."""
        if self.system_prompt not in (None, own):
            raise UserError(
                f"{self.role}.system_prompt={self.system_prompt[:40]!r}: the prompt has a system message of its own, "
                f"{own[:40]!r}; set {self.role}.system_prompt to null, and those of the prompts count"
            )

    @cached_property
    def _usable_template(self) -> str:
        template = self.chat_template
        if template is None:
            raise UserError(
                f"{self.role}: {self.path} has no chat template{self._other_templates()}; "
                f"set {self.role}.chat_template to a Jinja file, or prompts.template=plain"
            )
        if self.system_prompt is not None:
            self._require_system_prompt(template, self.system_prompt)
        first, second = (self._render(_asked(text, self.system_prompt), template) for text in (PROBE, "Another?"))
        if first == second:
            raise UserError(
                f"{self.template_source}: the chat template leaves out the user's text: it must write "
                f"message['content'], which is text here and no list of parts; set {self.role}.chat_template to another"
            )
        return template

    def _require_system_prompt(self, template: str, system_prompt: str) -> None:
        """Check that the template writes a system message."""
        try:
            without = self._render(_asked(PROBE, None), template)
        except UserError:
            return  # with or without one: told as any failure is, when it is rendered
        setting = f"{self.role}.system_prompt={system_prompt[:40]!r}"
        remedy = f"set it to null and write it into the prompts, or set {self.role}.chat_template to another template"
        try:
            rendered = self._render(_asked(PROBE, system_prompt), template)
        except UserError as error:
            raise UserError(f"{setting}: cannot be used: {error}; {remedy}") from None
        if rendered == without and system_prompt.strip():
            raise UserError(f"{setting}: {self.template_source} leaves a system message out; {remedy}")

    def _render(self, messages: Messages, template: str) -> str:
        try:
            return self.codec.render(messages, template)
        except Exception as error:  # whatever a user's template raises
            raise UserError(f"{self.template_source}: the chat template fails: {one_line(error)}") from None

    def _other_templates(self) -> str:
        """Name files and entries that a user may take for the chat template."""
        named = sorted(getattr(getattr(self.codec, "backend", None), "chat_template", None) or ())
        if named:
            return f" named 'default', and nothing says which of {', '.join(named)} is meant"
        return " (chat_template.json is for processors alone)" if (self.path / "chat_template.json").is_file() else ""


def _messages(turns: Conversation, system: str | None) -> Messages:
    first = () if system is None else (Turn("system", system),)
    return [turn._asdict() for turn in (*first, *turns)]


def _marks(text: str) -> tuple[str, ...]:
    """Nothing for what problems hold as well: words, such as a role's name after a special token, and single signs."""
    return (text,) if len(text) > 2 and not text.isalnum() else ()


def _asked(text: str, system: str | None) -> Messages:
    return _messages((Turn("user", text),), system)


def load_tokenizer(settings: ModelSettings, role: str) -> ModelTokenizer:
    """Read a model's tokenizer, chat template and stop tokens.

    The tokenizer is a Hugging Face directory, a JSON file of the ``tokenizers`` library, or a sentencepiece file. Stop
    tokens come from the settings, else generation_config.json, else config.json, else the tokenizer's end-of-sequence
    token. The chat template is the settings', else the tokenizer's own as transformers finds it, else that of the
    model's directory.

    Args:
        role: "student" or "teacher", for messages.

    Raises:
        UserError: nothing to read, nothing that says where a response ends, or a token that the model has no row for.
    """
    place = settings.tokenizer or settings.path
    require_token_ids(settings.path)  # first: transformers tells it in other words
    found, pad = stop_token_ids(settings, role), pad_token_id(settings)
    try:
        codec = load_codec(place, f"{role}.tokenizer" if settings.tokenizer else f"{role}.path", settings.path)
    except UserError:
        if (settings.path / "config.json").is_file():  # transformers reads it too, and may have failed there
            read_config_fields(settings.path)
        raise
    tokens = codec.tokens()
    if found is None and codec.eos_token_id is not None:
        found = (codec.eos_token_id,), str(place)
    if found is None:
        raise UserError(
            f"{role}: neither {settings.path} nor {place} says where a response ends; set {role}.stop_token_ids"
        )
    stop, stop_source = found
    names = set(tokens.values())
    if unknown := [token for token in stop if token not in names]:
        raise UserError(f"{stop_source}: stop token {unknown[0]} is not among the {len(names)} tokens of {place}")
    require_rows(tokens, settings, role, place)
    own_pad = pad if codec.pad_token_id is None else codec.pad_token_id
    template, template_source = _chat_template(settings, role, codec, place)
    return ModelTokenizer(
        role=role,
        path=place,
        codec=codec,
        stop_token_ids=stop,
        stop_source=stop_source,
        pad_token_id=stop[0] if own_pad is None else own_pad,
        chat_template=template,
        template_source=template_source,
        system_prompt=settings.system_prompt,
        context_length=read_json(settings.path / "config.json").get("max_position_embeddings"),
    )


def _chat_template(settings: ModelSettings, role: str, codec: Codec, place: Path) -> tuple[str | None, str]:
    """The template and where it is from. A tokenizer without one leaves the model directory's in force."""
    chosen = settings.chat_template
    if chosen is not None:
        try:
            return chosen.read_text(encoding="utf-8-sig"), f"{role}.chat_template={chosen}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{role}.chat_template={chosen}: cannot be read: {one_line(error)}") from None
    if codec.chat_template is not None:
        file = place / "chat_template.jinja"
        return codec.chat_template, str(file if file.is_file() else place / TOKENIZER_SETTINGS)
    folders = [] if isinstance(codec, HuggingFaceCodec) else [place]  # whose template is None: it has looked there
    for folder in [*folders, *([settings.path] if place != settings.path else [])]:
        template, file = _template_in(folder)
        if template is not None:
            return template, str(file)
    return None, str(settings.path)


def _template_in(folder: Path) -> tuple[str | None, Path]:
    """A directory's own chat template, found as transformers finds it."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
    file = folder / TOKENIZER_SETTINGS
    template: Any = read_json(file).get("chat_template")
    if isinstance(template, list):  # of {"name": ..., "template": ...}
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None, file
