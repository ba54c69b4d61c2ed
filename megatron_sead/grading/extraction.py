r"""Which answer a response gives: in its last box, after "####" or "the answer is", or on its last line."""

from __future__ import annotations

import re

from megatron_sead.boxed import box_cut_off, boxed, boxed_together
from megatron_sead.grading.conclusions import conclusion, raises_doubt, stated
from megatron_sead.grading.notation import without_wrapping

LONGEST_TEXT = 2000  # characters behind a mark that are looked at
_THOUGHT_ENDS = "</think>"
_EMPHASIS = (  # Markdown's pairs; 2*3*4 and x_1 are none, as letters or digits touch their outer sides
    re.compile(r"(?<![\w*)}])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])"),
    re.compile(r"(?<![\w\\])(_{1,2})(?=[^\s_{])([^_\n]*[^\s_])\1(?![\w{])"),
    re.compile(r"(`{1,3})(?=[^\s`])([^`\n]*)\1"),
)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$", re.MULTILINE)
_LINE_MARKUP = re.compile(
    r"^[ \t]*(?:(?:>|[-*+])[ \t]+|#{1,3}[ \t]+|#{4,6}[ \t]+(?=\W*(?:final\s+)?answer))+", re.I | re.M
)
_ENDING_TOKENS = re.compile(r"(?:\s*(?:<\|[^<>|\n]*\|>|</?[a-zA-Z]+>))+\s*$")
_LINK = (
    r"(?:\b(?:is|are|was|equals?|(?:should|would|must|will)\s+(?:only\s+)?be"
    r"|has\s+to\s+be|(?:comes?|turns?|works?)\s+out\s+(?:to\s+be|to|as))\b"
    r"|[:：＝→]|[=-]?>|=)"
)
_LOOSE_MARKUP = re.compile(r"^[\s*_`\"']+|(?:(?<!\^)[*`\"]|\s)+$")
_MARK = re.compile(
    rf"""(?:
        \#\#\#\#
      | [<\[]answer[>\]]
      | (?<!this\ )(?<!that\ )(?:\bans(?:wers?)?\b\.?|\b(?:correct|right)\s+(?:option|choice))
        (?:\s+(?:to|of|for)\b[^.:\n]{{0,80}}?|,\s[^.,:\d\n]{{1,40}},|\s\([^()\n]{{1,40}}\))? ["']? \s*
        (?:{_LINK}|[-–—](?=\s))
      | ^[^\w\n]{{0,20}}(?:the\s+)?(?:final\s+)?answer[^\w\n]{{0,20}}$
      | \bfinal\s+answer(?=\s+[-\d$\\])
      | 答案\s*(?:是|为|為|[:：])
    )
    (?:\s*(?:{_LINK}|therefore|thus|then|simply|just|exactly|indeed|actually|clearly|only|approximately|about|roughly
             |(?:equal\s+)?to|given\s+by|option|choice
             |(?:found|seen|shown|calculated|determined|known)\s+to\s+be)(?![a-zA-Z]))*
    \s*(?!(?:correct|right|wrong|incorrect|valid|verified|consistent|confirmed|helpful|reasonable|clear)\b)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_FORMULA = r"\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\text\s*\{[^{}]*\}"
_PROSE = re.compile(
    rf"""(?P<formula>{_FORMULA})
      | \n | [。！？；] | (?<!\.)\.(?=\s|$) | (?<!\\)\?(?=\s|$|[.)*"]) | (?<=\w!)(?=\s*$|\s+[A-Z]|\n|["*])
      | ;(?=\s*$|\s+[a-zA-Z]{{2,}}) | :(?=\s+[a-zA-Z]{{2,}})
      | ,?\s+(?:since|because|as|which|so|thus|hence|therefore|due|given|obtained|after|but|making|meaning)\b
      | (?:(?<=\d)|(?<=\d\$)),\s+(?:where|using|by|with|when|if|for|i\.e\.|that\s+is|namely|assuming)(?=[\s,])
      | ,\s+not\b | ,?\s+and\s+(?=(?:I|we|this|that|it|the|so|thus|hence)\b)
      | \s*[(\[](?=(?:since|because|as|i\.e|which|see|from|using|approximately|rounded|after)\b)
      | \s+\((?!p?mod\b)(?=[a-z][a-z-]+(?:\s[a-z-]+)*\)) | \s*[—–]\s*(?=[a-zA-Z])
      | \s+-{{1,2}}\s+(?=[a-zA-Z]{{2,}}\s+[a-zA-Z]) | [<\[][|/]""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)


def marked_answers(response: str, count: int = 1) -> list[str]:
    r"""The last ``count`` boxes of a response; without a box, what its last "####" or "the answer is" names.

    Boxes between which only "and", "or" or a comma stand are one answer: as many as there are, if that is more.
    A response that was cut inside of its last box, or before what its last mark names, has no answer: more digits
    might have followed. What a model thinks aloud in ``<think>...</think>`` is no answer either.
    """
    text = without_thinking(response)
    if box_cut_off(text):
        return []
    boxes = boxed(text)
    if boxes or names_a_box(text):
        together = boxed_together(text)
        return together if len(together) > count else boxes[-count:]
    text = _without_markdown(text)
    marks = list(_MARK.finditer(text))
    answer = _before_prose(text[marks[-1].end() :][:LONGEST_TEXT]) if marks else ""
    return [answer] if answer else []


def unmarked_answers(response: str) -> list[str]:
    """Of a response without any mark, its last line without Markdown, and what that line concludes."""
    text = without_thinking(response)
    if names_a_box(text):
        return []
    line = next((line for line in reversed(_without_fences(text).splitlines()) if line.strip()), "")
    text = _without_markdown(text)
    if not line or _MARK.search(text):
        return []
    bold = _BOLD.findall(line)
    plain = without_wrapping(_without_markdown(line).strip())
    concluded = conclusion(plain)
    if not concluded and len(bold) == 1 and not raises_doubt(plain):
        concluded = bold[0]
    return [plain, concluded] if concluded else [plain]


def without_thinking(response: str) -> str:
    """What follows the last ``</think>``; nothing while a thought is still open."""
    _, ended, after = response.rpartition(_THOUGHT_ENDS)
    return "" if not ended and "<think>" in response else after


def names_a_box(text: str) -> bool:
    """Whether a text has boxes, closed or not: an answer is looked for nowhere else then."""
    return r"\boxed" in text or r"\fbox" in text


def _without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def _without_markdown(text: str) -> str:
    text = _without_fences(text)
    end = max(0, len(text.rstrip()) - 100)
    text = _LINE_MARKUP.sub("", text[:end] + _ENDING_TOKENS.sub("", text[end:].rstrip()))
    for emphasis in _EMPHASIS:
        text = emphasis.sub(r"\2", text)
    return text


def _before_prose(text: str) -> str:
    """The answer that a mark names, without the sentence, the reason or the remark that follows it."""
    for stop in _PROSE.finditer(text):
        if stop["formula"] is None:
            if "and" in stop[0] and stated(text[: stop.start()]):  # "the total is 42 and the rest is 7"
                continue
            text = text[: stop.start()]
            break
    text = _LOOSE_MARKUP.sub("", text).rstrip(".,;: ")
    if text.count("}") > text.count("{"):  # of {"answer": "42"}
        text = _LOOSE_MARKUP.sub("", text.removesuffix("}"))
    return text
