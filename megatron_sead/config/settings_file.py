"""Any pydantic settings from a YAML file and dotted ``key=value`` overrides, with mistakes told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_sead.config.settings_values import NULLS, Plain, SettingsDumper, SettingsLoader, meaning, takes_text
from megatron_sead.errors import UserError

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def load_settings(schema: type[SettingsT], path: Path | None, overrides: list[str]) -> SettingsT:
    """Read a YAML file, apply overrides such as ``training.lr=1e-5`` (values are YAML), validate.

    Raises:
        UserError: unreadable file, unknown key (names the nearest valid one), wrong value (names what is valid). Of
            several mistakes all, a line each.
    """
    try:
        return settings_from(schema, read_yaml(path) if path is not None else {}, overrides)
    except RecursionError:
        raise UserError(f"{path}: a list or group holds itself") from None


def settings_from(schema: type[SettingsT], values: dict[str, Any], overrides: list[str]) -> SettingsT:
    """As `load_settings`, from values instead of a file. The overrides are written into them."""
    mistakes: dict[str, str] = {}  # by key: a setting is told once
    for override in overrides:
        try:
            _apply_override(schema, values, override)
        except UserError as error:
            mistakes[override.partition("=")[0].strip()] = str(error)
    known = _meanings([schema], values, mistakes)
    try:
        settings = schema.model_validate(known)
    except ValidationError as error:
        raise UserError("\n".join(_told(schema, error, mistakes))) from None
    if mistakes:
        raise UserError("\n".join(mistakes.values()))
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; {} for an empty file.

    Raises:
        UserError: missing, unreadable or malformed file, a key given twice, or no mapping at the top.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=SettingsLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    if values is None or values in NULLS:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold 'key: value' lines, not {_shown(values)}")
    return values


def dump_settings(settings: BaseModel) -> str:
    """YAML that ``load_settings`` reads back to an equal object, defaults included."""
    values = settings.model_dump(mode="json")
    return yaml.dump(values, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def dotted_keys(schema: type[BaseModel]) -> list[str]:
    """Every key that a file or an override may set, groups included: ``training``, ``training.steps``, ..."""
    return [key for key, _ in _fields(schema)]


def _fields(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        seen: set[str] = set()
        for group in groups_of(field):
            fields = [(key, inner) for key, inner in _fields(group, f"{prefix}{name}.") if key not in seen]
            seen |= {key for key, _ in fields}
            yield from fields


def repeated_overrides(overrides: list[str]) -> list[str]:
    """A line for each setting that is given twice with different values; the last counts."""
    given: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        given.setdefault(key.strip(), []).append(text)
    return [
        f"{key} is given {len(texts)} times ({', '.join(texts)}); the last counts"
        for key, texts in given.items()
        if len(set(texts)) > 1
    ]


def _apply_override(schema: type[BaseModel], values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key, fields = key.strip(), dict(_fields(schema))
    if not equals:
        raise UserError(f"{override!r}: an override is written key=value, for example training.steps=100")
    if key not in fields:
        raise UserError(_unknown_key(schema, key))
    value = _override_value(key, text, fields[key])
    if not groups_of(fields[key]):
        _set(values, key, value)
    elif isinstance(value, dict):  # those of its settings that are named change
        for name, item in flatten(value, f"{key}.").items():
            _set(values, name, item)
    else:
        raise UserError(_no_group(schema, key, meaning(key, value, Any)))


def _override_value(key: str, text: str, field: FieldInfo) -> Any:
    """What an override sets.

    A setting that takes text gets what stands after the sign, whatever YAML would make of it, unless it is in quotes.
    All other settings get what YAML reads.
    """
    if takes_text(field.annotation) and text.lstrip()[:1] not in ("'", '"'):
        return Plain(text.strip())
    try:
        return yaml.load(text, Loader=SettingsLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text}{_yaml_problem(error)}; quote the value as YAML asks for") from None
    except RecursionError:
        raise UserError(f"{key}: is nested too deeply") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        inner = values.get(group)
        if not isinstance(inner, dict):
            inner = values[group] = {}
        values = inner
    values[leaf] = value


def _meanings(
    groups: list[type[BaseModel]], values: dict[str, Any], mistakes: dict[str, str], prefix: str = ""
) -> dict[str, Any]:
    """The values that the words of a file or an override mean, by the types of their settings.

    Args:
        mistakes: gets those that mean nothing, which are left out, by key.
    """
    fields = {name: field for group in reversed(groups) for name, field in group.model_fields.items()}
    known: dict[str, Any] = {}
    for name, value in values.items():
        field = fields.get(name)
        inner = groups_of(field) if field else []
        if inner and isinstance(value, dict):
            known[name] = _meanings(inner, value, mistakes, f"{prefix}{name}.")
        elif inner and (value is None or value in NULLS):  # all its lines are comments
            known[name] = {}
        else:
            try:
                known[name] = meaning(f"{prefix}{name}", value, field.annotation if field else Any)
            except UserError as error:
                mistakes.setdefault(f"{prefix}{name}", str(error))
    return known


def groups_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The group of settings that a field is; several where one of its settings, its discriminator, says which."""
    kinds = (field.annotation, *get_args(field.annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _told(schema: type[BaseModel], error: ValidationError, mistakes: dict[str, str]) -> list[str]:
    """All mistakes, a line each: those known before, and the others that validation has found."""
    lines = list(mistakes.values())
    for details in error.errors():
        lines += _describe(schema, details, mistakes)
    return list(dict.fromkeys(lines))


def _describe(schema: type[BaseModel], details: ErrorDetails, known: Container[str]) -> list[str]:
    """What pydantic has found, in lines; none for a setting of `known` mistakes."""
    fields = dict(_fields(schema))
    key, choice = _key_and_choice(fields, details["loc"])
    if key in known:
        return []
    field = fields.get(key)
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden" and choice and key in fields:
        return [_key_of_another_choice(schema, key, choice, given)]
    if kind == "extra_forbidden":
        return [_unknown_key(schema, key)]
    if kind == "union_tag_invalid" and field is not None:
        words = details["ctx"]["expected_tags"].rpartition(", ")
        name = field.discriminator
        return [f"{key}.{name}={_shown(given.get(name))}: must be {' or '.join(filter(None, words[::2]))}"]
    group, _, place = key.rpartition(".")
    if kind == "missing" and place.isdigit():  # the input is the list that is too short
        return [f"{group}={_shown(given)}: must have as many values as {list(fields[group].default)}"]
    if kind == "missing" and choice and field is not None:
        return [f"{choice}: needs {key} ({field.description})"]
    if kind == "missing":
        required = [k for k in dotted_keys(schema) if k.startswith(f"{key}.") and fields[k].is_required()]
        return [
            f"{k}: missing; set it in the file or as {k}=... ({fields[k].description or 'no default'})"
            for k in required or [key]
            if k not in known
        ]
    if kind == "value_error":  # raised by a validator of ours: of a setting, or of a group, a line a mistake
        told = str(details["ctx"]["error"]).splitlines()
        return told if field is None or groups_of(field) else [f"{key}={_shown(given)}: {line}" for line in told]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [_no_group(schema, key, given)]
    if kind == "tuple_type" and field is not None:
        return [f"{key}={_shown(given)}: must be a list, for example {list(field.default)}"]
    if given is None and kind != "literal_error":
        return [f"{key}=null: must have a value ({field.description if field and field.description else kind})"]
    return [f"{key}={_shown(given)}: {_told_by_pydantic(details)}"]


def _key_and_choice(fields: dict[str, FieldInfo], place: tuple[int | str, ...]) -> tuple[str, str | None]:
    """Dotted key of a place that pydantic names, and within a group of several, "GROUP.DISCRIMINATOR='WORD'"."""
    key, choice = "", None
    for part in place:
        field = fields.get(key)
        if choice is None and field is not None and field.discriminator is not None:
            choice = f"{key}.{field.discriminator}={part!r}"  # pydantic puts the word into the place
        else:
            key = f"{key}.{part}" if key else str(part)
    return key, choice


def _key_of_another_choice(schema: type[BaseModel], key: str, choice: str, given: object) -> str:
    group, _, leaf = key.rpartition(".")
    field = dict(_fields(schema))[group]
    words = [
        repr(kind.model_fields[str(field.discriminator)].default)
        for kind in groups_of(field)
        if leaf in kind.model_fields
    ]
    name = f"{group}.{field.discriminator}"
    return (
        f"{key}={_shown(given)}: is a setting of {name} {' or '.join(words)}, and {choice} here; leave out one of them"
    )


def _told_by_pydantic(details: ErrorDetails) -> str:
    return details["msg"].replace("Input should be", "must be").replace("String should have", "must have")


def _no_group(schema: type[BaseModel], key: str, given: object) -> str:
    keys = [k.rpartition(".")[2] for k in dotted_keys(schema) if k.rpartition(".")[0] == key]
    return f"{key}={_shown(given)}: must be a group of settings: {', '.join(keys)}"


def _unknown_key(schema: type[BaseModel], key: str) -> str:
    valid = dotted_keys(schema)
    group, _, leaf = key.rpartition(".")
    same_leaf = [k for k in valid if k.rpartition(".")[2] == leaf]  # right name, wrong or no group
    if key in valid:  # in a file, as one word
        return f"{key}: in a file, settings stand under their group: {group}: on a line of its own, then   {leaf}: ..."
    near = same_leaf or difflib.get_close_matches(key, valid, n=1)
    if near:
        return f"{key}: unknown setting; did you mean {difflib.get_close_matches(key, near, n=1, cutoff=0.0)[0]}?"
    siblings = [k for k in valid if k.rpartition(".")[0] == group] or [k for k in valid if "." not in k]
    return f"{key}: unknown setting; valid are {', '.join(siblings)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {' '.join(str(error).split())}"
    mark = error.problem_mark
    return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
