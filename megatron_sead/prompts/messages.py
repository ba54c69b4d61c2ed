"""A prompt as turns of a conversation: text is a user's turn; a list of messages keeps its roles. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_sead.prompts.answers import MISSING, is_blank

ROLES = ("system", "user", "assistant")
# What a chat template may write beside the content: a prompt that loses it silently is another prompt
MORE_THAN_TEXT = ("tools", "tool_calls", "tool_call_id", "functions", "function_call", "function_calls")
THOUGHTS = "reasoning_content"
NO_TEXT = "holds no text"  # how it is said of an empty prompt
WRITTEN_BY_PROGRAMS = ("[{'", "array([", "[array(")  # a list as Python or numpy print it


class Turn(NamedTuple):
    """One message."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


def conversation(value: Any) -> Conversation:
    """The turns that a prompt's field holds: text, a list of messages, or such a list as JSON in a text.

    A system message may stand first; the last message is the user's, for the model writes next.

    Raises:
        ValueError: says what it holds instead, as the end of "the field ...".
    """
    value = _written_messages(value)
    if isinstance(value, str):
        _require_words(value, "")
        return (Turn("user", value),)
    if not isinstance(value, Sequence):
        raise ValueError(f"must be text or a list of messages, not {type(value).__name__}")
    turns = tuple(_turn(item, number) for number, item in enumerate(value, 1))
    if not turns:
        raise ValueError(f"{NO_TEXT}: no message is in it")
    if late := next((number for number, turn in enumerate(turns[1:], 2) if turn.role == "system"), None):
        raise ValueError(f"has a system message as message {late}; it must be the first")
    if turns[-1].role != "user":
        raise ValueError(
            f"ends with a message of the {turns[-1].role}: the last must be the user's, for the model writes next; "
            "name a field with the prompt alone"
        )
    return turns


def with_instruction(turns: Conversation, instruction: str) -> Conversation:
    """The same, with text appended to the last message."""
    if not instruction:
        return turns
    return (*turns[:-1], Turn(turns[-1].role, turns[-1].content + instruction))


def as_text(turns: Conversation) -> str:
    """What is asked, for messages and comparisons: the user's words where there is nothing else."""
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def as_value(turns: Conversation) -> str | list[dict[str, str]]:
    """For a JSON file; `conversation` reads it back."""
    if len(turns) == 1 and isinstance(_written_messages(turns[0].content), str):
        return turns[0].content
    return [turn._asdict() for turn in turns]


def _written_messages(value: Any) -> Any:
    """A list of messages that was written as JSON into a text; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("[") and '"role"' in text:
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            if text.startswith(('[{"role"', '[{"content"')):
                raise ValueError("begins as a list of messages in JSON, and is not valid JSON") from None
            return value
        if isinstance(items, list) and items and all(isinstance(item, dict) and "role" in item for item in items):
            return items
    if text.startswith(WRITTEN_BY_PROGRAMS) and "'role'" in text:
        raise ValueError("is a list of messages as Python prints it, not JSON; write it as JSON or as a list")
    return value


def _turn(item: Any, number: int) -> Turn:
    where = f"message {number}"
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        found = f"an object with {', '.join(map(repr, item))}" if isinstance(item, dict) else type(item).__name__
        raise ValueError(f"must be text or a list of messages with 'role' and 'content': {where} is {found}")
    role, content = item["role"], _content(item["content"], where)
    if role not in ROLES:
        raise ValueError(f"has a {where} with role {role!r}; must be one of {', '.join(ROLES)}")
    if more := next((name for name in (*MORE_THAN_TEXT, THOUGHTS) if item.get(name)), None):
        raise ValueError(f"has {more!r} in {where}; only text is asked here")
    if role == "user":
        _require_words(content, f" in {where}")
    return Turn(role, content)


def _content(content: Any, where: str) -> str:
    """Text, or its parts as multi-modal sets have them."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"has content of type {type(content).__name__} in {where}; must be text")
    return content


def _require_words(text: str, where: str) -> None:
    if is_blank(text) or text.strip() in MISSING:
        shown = f": it is {text.strip()!r}" if not is_blank(text) else ""
        raise ValueError(f"{NO_TEXT}{where}{shown}")
