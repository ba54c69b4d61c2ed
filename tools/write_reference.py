"""What docs say of settings, metrics, policies and engines, from the code. A test finds old pages."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package beside this file, whatever is installed

from megatron_sead.config.rollouts import AnyRollouts  # noqa: E402
from megatron_sead.config.run import RunConfig  # noqa: E402
from megatron_sead.distillation.policies import POLICIES  # noqa: E402
from megatron_sead.reporting.metrics import METRICS  # noqa: E402

DOCS = ROOT / "docs"
RENEW = "Generated from the code by `python tools/write_reference.py`; do not edit."
WORDS = {Path: "a path", str: "text", bool: "`true`, `false`", int: "a whole number", float: "a number"}
SIGNS = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}


def settings_page() -> str:
    """Every setting of a run: name, default, valid values, meaning; a section a group."""
    lines = ["# Settings of a run", "", RENEW, ""]
    lines += ["In a YAML file settings stand under their group; on a command line they are `group.name=value`.", ""]
    for title, group in groups(RunConfig, ""):
        lines += [f"## {title or 'The run'}", "", one_line(group.__doc__), ""]
        lines += ["| setting | default | valid | meaning |", "|---|---|---|---|"]
        prefix = f"{title.split(' ')[0]}." if title else ""
        for name, field in group.model_fields.items():
            if not groups_in(field):
                cells = (f"`{prefix}{name}`", default(field), valid(field), one_line(field.description))
                lines.append(row(*cells))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def metrics_page() -> str:
    """Every metric of a step: name, unit, meaning, where it is computed."""
    lines = ["# Metrics", "", RENEW, ""]
    lines += [
        "A run writes one line of JSON a step into `metrics.jsonl`, and the same numbers into TensorBoard. A line has "
        "every key, but for what there is nothing to say of: a skipped step's divergences and zones, and how far an "
        "engine is from the student where it tells no log-probabilities. null: not finite, or not known.",
        "",
        "| key | unit | meaning | computed in |",
        "|---|---|---|---|",
    ]
    lines += [row(f"`{m.name}`", m.unit, m.meaning, f"`{m.computed_in}`") for m in METRICS]
    return "\n".join(lines) + "\n"


def groups(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Title and class of a group and of those in it. Where a setting chooses among groups, the title has its word."""
    yield prefix, schema
    for name, field in schema.model_fields.items():
        inner = groups_in(field)
        for group in inner:
            choice = f" ({group.model_fields[str(field.discriminator)].default})" if len(inner) > 1 else ""
            yield from groups(group, f"{prefix}.{name}{choice}".lstrip("."))


def groups_in(field: FieldInfo) -> list[type[BaseModel]]:
    return [kind for kind in kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def kinds(annotation: Any) -> list[Any]:
    """The types that a type allows."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for argument in get_args(annotation) for kind in kinds(argument)]
    return [annotation]


def default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{json.dumps(field.default)}`"


def number(value: Any) -> str:
    """Whole numbers with every digit."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def valid(field: FieldInfo) -> str:
    limits = [
        f"{sign} {number(getattr(limit, name))}"
        for limit in field.metadata
        for kind, (name, sign) in SIGNS.items()
        if isinstance(limit, kind)
    ]
    words = [word(kind) for kind in kinds(field.annotation) if kind is not type(None)]
    nothing = ["`null`"] if type(None) in kinds(field.annotation) else []
    return ", or ".join([" or ".join(words) + (f" {', '.join(limits)}" if limits else ""), *nothing])


def word(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"a list of: {word(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    return WORDS[kind]


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def policies_page() -> str:
    """The page as it is, with the policies of the registry in its table."""
    return with_table("policies.md", "what it teaches", [(policy.name, policy.summary) for policy in POLICIES.values()])


def engines_page() -> str:
    """The page as it is, with the engines that settings know in its table."""
    groups = [(group.model_fields["engine"].default, one_line(group.__doc__)) for group in get_args(AnyRollouts)]
    return with_table("engines.md", "what it does", groups)


def with_table(page: str, heading: str, rows: list[tuple[str, str]]) -> str:
    """A page written by hand, whose table of names is replaced."""
    table = "".join(f"{row(f'`{name}`', meaning)}\n" for name, meaning in rows)
    before, head, after = (DOCS / page).read_text(encoding="utf-8").partition(f"| name | {heading} |\n|---|---|\n")
    assert head, f"docs/{page} has no table of names"
    return before + head + table + after[after.index("\n\n") + 1 :]


PAGES = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "policies.md": policies_page,
    "engines.md": engines_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
