"""Answers by a field of their problems' rows: a level, a subject, where a problem is from."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sead.evaluation.accuracy import numbers_first
from megatron_sead.evaluation.tally import Graded
from megatron_sead.prompts.rows import Row

FIELDS = ("level", "subject", "subfield", "type", "source", "data_source")  # of released sets
MOST_GROUPS = 40  # a field with more values is a name, not a group
NONE = "(none)"  # a row without a value

Answers = Sequence[Sequence[Graded]]  # of each prompt
Groups = dict[str, list[str]]  # by field: of each prompt its group


def groups_of(rows: Sequence[Row], more: Sequence[str] = ()) -> Groups:
    """The fields that say something in common of several rows; those of the release too, which prepared rows keep.

    Args:
        more: fields that are looked at first.
    """
    found = {name: [_value(row, name) for row in rows] for name in dict.fromkeys((*more, *FIELDS))}
    most = min(MOST_GROUPS, len(rows) - 1)
    return {name: values for name, values in found.items() if 1 < len(set(values)) <= most}


def by_group(values: Sequence[str], answers: Answers) -> dict[str, Answers]:
    """The answers of each group; the groups in order.

    Args:
        values: of each prompt its group.
    """
    groups: dict[str, list[Sequence[Graded]]] = {}
    for value, of_prompt in zip(values, answers, strict=True):
        groups.setdefault(value, []).append(of_prompt)
    return {name: groups[name] for name in sorted(groups, key=numbers_first)}


def _value(row: Row, name: str) -> str:
    value = row.value(name, None)
    if value is None or isinstance(value, dict | list):
        value = row.value(f"source.{name}", None)
    return NONE if value is None or isinstance(value, dict | list) else str(value)
