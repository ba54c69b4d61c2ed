"""How the inputs of a run differ from those of its checkpoint, in words."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from megatron_sead.config.run import InputName
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.wording import counted, first_of

# JSON. By the input's name (`InputName`) a dictionary of values by aspect, and of dictionaries of such; of a prompt
# set its "count" and "columns": a CRC-32 a prompt, 4 bytes each in base64
Fingerprint = dict[str, Any]

CHECKSUM = "crc32 "  # how the text of an aspect begins that only says whether it is the same


def differences(
    then: Fingerprint, now: Fingerprint, prompts: Sequence[Prompt], heldout: list[Prompt]
) -> dict[str, str]:
    """What has changed, in words, by the input's name. What `then` does not hold is not compared: a checkpoint of an
    earlier version knows less. Causes come before what follows from them: a tokenizer before the prompts' tokens."""
    found = {}
    for name in [name for name in (*get_args(InputName), "software") if name in then and name in now]:
        if name == "prompts":
            text = _rows_that_differ(then[name], now[name], prompts)
        elif name == "evaluation":
            text = _rows_that_differ(then[name]["prompts"], now[name]["prompts"], heldout)
        else:
            text = _values_that_differ(then[name], now[name])
        if text:
            found[name] = text
    return found


def _values_that_differ(then: dict[str, Any], now: dict[str, Any]) -> str:
    """ "config sliding_window was 8 and is 16; tensor differs: NAME (and 3 more)"."""
    before, after = dict(_leaves(then)), dict(_leaves(now))
    changed = [key for key in before if key in after and before[key] != after[key]]
    texts = [_changed(key, before[key], after[key]) for key in changed]
    texts += [f"{key} is missing" for key in before if key not in after and str(before[key]).startswith(CHECKSUM)]
    texts += [f"{key} is new" for key in after if key not in before and key.startswith("weights ")]
    return first_of(texts, 2, "; ")


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{prefix} {key}".strip())


def _changed(key: str, before: Any, after: Any) -> str:
    if str(before).startswith(CHECKSUM):
        return f"{key} differs"
    return f"{key} was {_short(before)} and is {_short(after)}"


def _rows_that_differ(then: dict[str, Any], now: dict[str, Any], prompts: Sequence[Prompt]) -> str:
    columns_then, columns_now = then["columns"], now["columns"]
    texts = []
    if then["count"] != now["count"]:
        texts.append(f"{counted(then['count'], 'prompt')} then, {now['count']} now")
    names = columns_then.keys() & columns_now.keys()
    if (order := _order_of_ids(columns_then["id"], columns_now["id"], prompts)) is not None:
        return "; ".join([*texts, order])
    for name in sorted(names):
        rows = _rows(columns_then[name], columns_now[name])
        if rows:
            what = name.replace("_token_ids", "'s token ids")
            differ = "differ, the first is" if len(rows) > 1 else "differ:"
            texts.append(f"{what} of {counted(len(rows), 'prompt')} {differ} {_short(prompts[rows[0]].id)}")
    return first_of(texts, 2, "; ")


def _order_of_ids(then: str, now: str, prompts: Sequence[Prompt]) -> str | None:
    """How the ids, packed, differ; None: they do not."""
    if then == now:
        return None
    rows = _rows(then, now)
    first = rows[0] if rows else min(len(_cells(then)), len(_cells(now)))
    here = f"is {_short(prompts[first].id)} now" if first < len(prompts) else "is gone"
    if len(then) == len(now) and sorted(_cells(then)) == sorted(_cells(now)):
        return f"they are in another order: the first that differs, number {first + 1}, {here}"
    return f"the first that differs, number {first + 1}, {here}"


def _rows(then: str, now: str) -> list[int]:
    pairs = zip(_cells(then), _cells(now), strict=False)
    return [row for row, (before, after) in enumerate(pairs) if before != after]


def _cells(packed: str) -> list[bytes]:
    data = b64decode(packed)
    return [data[start : start + 4] for start in range(0, len(data), 4)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
