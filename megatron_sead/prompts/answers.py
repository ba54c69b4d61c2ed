"""Reference answers as data sets write them: numbers, lists, GSM8K's rationales, MATH's boxed solutions."""

from __future__ import annotations

from typing import Any


def reference_answers(value: Any) -> tuple[str, ...]:
    """What must be given, one string an answer; () when the value holds none.

    27.0 is "27"; "... #### 72" (GSM8K) is "72"; of a text with \\boxed{...} it is the last box; a list holds several.
    """
    if isinstance(value, (list, tuple)):
        return tuple(answer for item in value for answer in reference_answers(item))
    if value is None or isinstance(value, (dict, bool)):
        return ()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif (box := last_boxed(text)) is not None:
        text = box.strip()
    return (text,) if text else ()


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} (or \\fbox{...}) holds, braces balanced; None when there is none that closes."""
    end = len(text)
    while True:
        start = max(text.rfind("\\boxed{", 0, end), text.rfind("\\fbox{", 0, end))
        if start < 0:
            return None
        opening = text.index("{", start)
        depth = 0
        for i in range(opening, len(text)):
            escaped = text[i - 1] == "\\"
            if text[i] == "{" and not escaped:
                depth += 1
            elif text[i] == "}" and not escaped:
                depth -= 1
                if depth == 0:
                    return text[opening + 1 : i]
        end = start
