r"""What a response's final answer is, and what can be said about two answers without computer algebra."""

from __future__ import annotations

import re

from megatron_sead.boxed import boxed

_MARKED = re.compile(r"(?:####|(?:final\s+)?answer\s*(?:is|:))\s*(?:\\?:)?\s*(.+)", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+(?:\.0*)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.0*)?")
_UNITLESS = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\[!,;: ]|\\(?:left|right)(?![a-zA-Z])|[$~]|\\\$")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")


def marked_answers(response: str, count: int = 1) -> list[str]:
    r"""The last ``count`` boxes of a response; without a box, what its last "####" or "the answer is" names.

    A response that was cut inside of its first box has no answer: more digits might have followed.
    """
    boxes = boxed(response)
    if boxes or r"\boxed" in response:
        return boxes[-count:]
    marked = _MARKED.findall(response)
    return [marked[-1].strip().rstrip(".")] if marked else []


def last_line(response: str) -> str:
    """The last line that is not blank; "" when all are."""
    return next((line.strip() for line in reversed(response.splitlines()) if line.strip()), "")


def exactly_same(reference: str, given: str) -> bool | None:
    """Whether two answers are the same integer or the same text; None when only computer algebra can tell."""
    left, right = integer(reference), integer(given)
    if left is not None and right is not None:
        return left == right
    left_text, right_text = normalized(reference), normalized(given)
    if left_text == right_text or not left_text or not right_text:
        return bool(left_text and right_text)
    return None


def integer(answer: str) -> int | None:
    r"""The integer that an answer is: 27, 27.0, 1,000, 1{,}000, $27$, 336^\circ. None when it is anything else."""
    text = normalized(answer)
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    if not _INTEGER.fullmatch(text) or len(text) > 1000:  # Python refuses to read integers of over 4300 digits
        return None
    return int(text.partition(".")[0])


def normalized(answer: str) -> str:
    """The answer without what does not change its value: dollar signs, degrees, spacing, \\left, text commands."""
    text = _TEXT.sub(r"\1", _UNITLESS.sub("", answer))
    return " ".join(text.split()).strip().rstrip(".").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")


def split_answers(answer: str) -> list[str]:
    r"""Parts between commas, semicolons and the words "and", "or" that no bracket encloses. "(1, 2)" is one part."""
    if integer(answer) is not None:
        return [answer]
    text = re.sub(r"\\text\s*\{\s*(?:and|or)\s*\}|\s(?:and|or)\s", ",", answer)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character in ",;" and depth <= 0 and not (i and text[i - 1] == "\\"):  # \, and \; are spaces
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
