"""Reference answers as data sets write them: numbers, lists, GSM8K's rationales, MATH's boxed solutions."""

from __future__ import annotations

from typing import Any

from megatron_sead.boxed import last_boxed


def reference_answers(value: Any) -> tuple[str, ...]:
    r"""What must be given, one string an answer; () when the value holds none.

    27.0 is "27"; "... #### 72" (GSM8K) is "72"; a text with ``\boxed{...}`` is its last box; a list holds several.
    """
    if isinstance(value, list | tuple):
        return tuple(answer for item in value for answer in reference_answers(item))
    if value is None or isinstance(value, dict | bool):
        return ()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif (box := last_boxed(text)) is not None:
        text = box.strip()
    return (text,) if text else ()
