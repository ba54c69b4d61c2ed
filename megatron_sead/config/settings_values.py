"""What a word in a settings file means depends on the setting: ``no`` may be false, and ``012`` a name.

YAML alone would decide by the word: a date, an octal number or ``no`` where text is wanted, and text where somebody
writes ``None`` for nothing. Here scalars without quotes stay words until the type of their setting is known.
"""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from megatron_sead.errors import UserError

NULLS = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
NOTHINGS = ("none", "nil", "undefined", "nan", "n/a", "<none>", "void")  # in other languages, in lower case
NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?(\d[\d_]*)?([eE][-+]?\d+)?", re.ASCII)
LEADING_ZERO = re.compile(r"[-+]?0[\d_]+", re.ASCII)
SPECIAL_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


class Plain(str):
    """A scalar that was written without quotes."""

    __slots__ = ()


class SettingsLoader(yaml.SafeLoader):
    """Plain scalars as `Plain`. SafeLoader keeps the last of two equal keys and says nothing; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word, not a list or a group", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}

    def construct_plain(self, node: yaml.ScalarNode) -> str:
        return Plain(node.value) if node.style is None else str(node.value)


for _tag in ("null", "bool", "int", "float", "timestamp", "str"):
    SettingsLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", SettingsLoader.construct_plain)


class SettingsDumper(yaml.SafeDumper):
    """Quotes the words that `meaning` would not take for text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if text.lower() in NOTHINGS else None)


SettingsDumper.add_representer(str, _represent_text)


def takes_text(annotation: Any) -> bool:
    """Is a setting of this type text, a path, or one of some words?"""
    return any(kind in (str, Path) or isinstance(kind, str) for kind in _kinds(annotation))


def meaning(key: str, value: Any, annotation: Any) -> Any:
    """What was written for a setting, as a value for its validation.

    Args:
        value: as `SettingsLoader` makes it.

    Raises:
        UserError: a word that means something else than it seems to.
    """
    if isinstance(value, list):
        items = [kind for kind in _kinds(annotation) if get_origin(kind) in (list, tuple)]
        arguments = [argument for item in items for argument in get_args(item)] or [Any]
        return [
            meaning(f"{key}.{place}", item, arguments[min(place, len(arguments) - 1)])
            for place, item in enumerate(value)
        ]
    if isinstance(value, dict):
        return {name: meaning(f"{key}.{name}", item, Any) for name, item in value.items()}
    if isinstance(value, str):
        _refuse_what_is_no_text(key, value)
    if not isinstance(value, Plain):
        return value
    kinds, word = _kinds(annotation), str(value)
    if word in kinds:  # one of the setting's own words: curriculum.mode=none
        return word
    if word.lower() in NOTHINGS and {str, Path, type(None)} & {*kinds}:
        raise UserError(f"{key}={word}: {_for_nothing(kinds)}")
    return _text(key, word, kinds) if takes_text(annotation) else _number(key, word, kinds)


def _text(key: str, word: str, kinds: list[Any]) -> str | None:
    if not word and kinds == [str]:
        return ""
    if word in NULLS:
        return None
    if word.lower() in TRUE + FALSE and (str in kinds or Path in kinds):
        raise UserError(f"{key}={word}: must be text, not a boolean; {_if_meant(word)}")
    return word


def _number(key: str, word: str, kinds: list[Any]) -> Any:
    if word in NULLS:
        return None
    if word.lower() in TRUE + FALSE:
        if bool not in kinds and {int, float} & {*kinds}:
            raise UserError(f"{key}={word}: must be a number, not a boolean")
        return word.lower() in TRUE
    if LEADING_ZERO.fullmatch(word):
        raise UserError(f"{key}={word}: a number must not begin with 0; octal numbers are not read")
    word = SPECIAL_FLOATS.get(word.lower(), word)
    for read in (int, float):
        try:
            return read(word) if NUMBER.fullmatch(word) or word in SPECIAL_FLOATS.values() else word
        except ValueError:
            continue
    return word


def _for_nothing(kinds: list[Any]) -> str:
    nothing = "write null for nothing" if type(None) in kinds else "must have a value"
    return f"{nothing}; {_if_meant('the word')}" if str in kinds or Path in kinds else nothing


def _if_meant(word: str) -> str:
    return f"""if {word} is meant as text, put it in double quotes (on a command line: '"..."')"""


def _refuse_what_is_no_text(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}={text!r}: is not UTF-8 text") from None


def _kinds(annotation: Any) -> list[Any]:
    """The types that a type allows: of ``Literal`` its words, of an ``Annotated`` the inner one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for argument in get_args(annotation) for kind in _kinds(argument)]
    return list(get_args(annotation)) if origin is Literal else [annotation]
