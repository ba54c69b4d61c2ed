r"""One spelling for what is written in many ways: Unicode and plain text become LaTeX, wrappers and spacing go."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∞": r"\infty ", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "°": r"^\circ ", "…": r"\ldots ", "⋯": r"\cdots ", "≈": r"\approx ", "′": "'", "’": "'",
    "⁄": "/", "，": ",", "。": ".", "、": ",", "ℝ": r"\mathbb{R}", "\u200b": "",
}  # fmt: skip
_WRAPPINGS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("{", "}"))
_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|pi"
_DEGREES_MATTER = r"\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?[\s{(]*"
_SPELLINGS = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\s+", " "),
        (r"\\(?:left|right)(?:\.|(?![a-zA-Z]))|\\(?:[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"\\!\s*", ""),
        (r"(?i:\\text\s*\{\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s*\}\s*:?)", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\(?:text)?color\s*\{\s*[a-zA-Z]+\s*\}", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:mathrm|text|rm)\s*\{\s*([eid]|\d[\d.,]*)\s*\}", r" \1"),
        (r"(?<=\d)\s*(?:\\colon(?![a-zA-Z])|\\text\s*\{\s*(?:to|:)\s*\}|\bto\b)\s*(?=\d)", ":"),
        (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
        (r"(?i:\\text\s*\{\s*(?:the\s+)?empty\s+set\s*\}|^\s*(?:the\s+)?empty\s+set$)", r"\\emptyset "),
        (r"^(?:\\text\s*\{)?\s*(?i:all\s+reals?(?:\s+numbers)?)\s*\}?$", r"\\mathbb{R}"),
        (r"^\\text\s*\{\s*[A-Za-z][^{}\d:]*:\s*\}", ""),
        (r"(?<=\d)\s*\^\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)\b", ""),
        (r"\\frac\s+(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:mbox|hbox|text(?:normal|rm|bf|it|sf)|math(?:rm|bf|it|sf))\s*\{", r"\\text{"),
        (r"\{\s*,\s*\}", ","),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?:\\text\s*\{\s*(?:\\?%|percent(?:age)?)\s*\}|\\?%|\bpercent\b)", r"\\%"),
        (r"\\\$|\$|[€£¥]|\\(?:pounds|euro)(?![a-zA-Z])", ""),
        (
            rf"({_DEGREES_MATTER})(\d+(?:\.\d+)?)\s*\^\s*(?:\{{\s*\\circ\s*\}}|\\circ(?![a-zA-Z]))",
            r"\1\\frac{\2\\pi}{180}",
        ),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])", ""),
        (r"\\text\s*\{\s*infinity\s*\}|(?<![a-zA-Z\\])infinity(?![a-zA-Z])", r"\\infty"),
        (rf"(?<![a-zA-Z\\])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1"),
        (r"\\sqrt\s*(\[[^\[\]]*\])\s*(\d)", r"\\sqrt\1{\2}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"(?<![\\^{*])\*(?=\s*[\w({\\-])", r"\\cdot "),
        (r"(?<![a-zA-Z\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])", r"\1\\cdot 10^{\2}"),
        (r" +", " "),
        (r"^ ?(?:=|\\approx(?![a-zA-Z])) ?|(?<!\\)\\$", ""),
    )
)
_TEXT = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
_PUNCTUATION = re.compile(r"(?:(?<!\.)\.|[,;:?]|\s)+$")
_SPACE = re.compile(r"(?<!\w) | (?!\w)")
_UNIT = re.compile(
    r"""(?:(?<=[\w})])\s*\\text\s*\{(?P<text>[^{}]*)\}
      | (?<=[\d})])(?P<words>(?:\s(?:[a-zA-Z]{4,}|[ckm]m|k?g|ml|ft|in|lbs?|oz|mi|mph|min|sec|hrs?|sq|cu|day|men|old
                                   |[km]m/h|mi/h|k?m/s|ft/s|per|of|an?|the)\.?)+)
      | (?<=[\d})])\s?(?:[ckm]m|kg|ft|lbs?|mph))(?:\s*\^\s*\{?\s*\d\s*\}?)?$""",
    re.VERBOSE,
)
_HALF_OF_DAY = re.compile(r"\s*\b([ap])\.?\s?m\b\.?$", re.IGNORECASE)
_DOTS = re.compile(r"\.\.\.|\\[lc]?dots(?![a-zA-Z])")
_NO_UNITS = re.compile(
    r"\b(?:and|or|if|for|when|where|with|mod|modulo|base|hundred|thousand|million|billion|trillion|dozen|times|choose"
    r"|to|not|is|are|was|than|less|more|least|most|over|equals?|plus|minus|half|[ap]\.?m)\b",
    re.IGNORECASE,
)


def without_wrapping(answer: str) -> str:
    """The answer without the math delimiters, braces and emphasis that enclose the whole of it."""
    text = answer.strip()
    for opening, closing in _WRAPPINGS * 2:
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inner and closing not in inner:
            text = inner.strip()
    return text


@lru_cache(maxsize=4096)
def standard(answer: str) -> str:
    r"""The answer in one spelling of LaTeX: ½ is ``\frac{1}{2}``, 1e3 ``1\cdot 10^{3}``, and dollars and degrees go."""
    text = without_wrapping(_latex_signs(answer))
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return _PUNCTUATION.sub("", without_wrapping(text)).strip()


def unwrapped(answer: str) -> str:
    """The answer in the standard spelling, with the words in text commands bare."""
    return _PUNCTUATION.sub("", " ".join(_TEXT.sub(r"\1", standard(answer)).split()))


def as_text(answer: str) -> str:
    """What two answers that are the same text share: no text commands, no spaces that mean nothing."""
    text = _DOTS.sub(r"\\ldots ", unwrapped(answer))
    return _PUNCTUATION.sub("", _SPACE.sub("", _HALF_OF_DAY.sub(lambda half: f" {half[1].lower()}m", text)))


def has_dots(answer: str) -> bool:
    r"""Whether dots stand for what an answer leaves out, as in 1, 2, \ldots, n."""
    return _DOTS.search(standard(answer)) is not None


def without_unit(answer: str) -> str:
    r"""A number without the words that say what it counts: ``5\text{ cm}^2``, 42 apples. Not 5 million, not 1 or 2."""
    text = standard(answer)
    unit = _UNIT.search(text)
    if unit is None or _NO_UNITS.search(unit["text"] or unit["words"] or ""):
        return text
    return text[: unit.start()].strip()


def _latex_signs(text: str) -> str:
    text = re.sub(r"[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+", lambda m: f"^{{{_plain(m[0])}}}", text)
    text = re.sub(r"[₀-₉₊₋]+", lambda m: f"_{{{_plain(m[0])}}}", text)
    text = "".join(_latex_sign(character) for character in text)
    return re.sub(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[a-zA-Z]|\\[a-z]+))", r"\\sqrt{\1\2\3}", text)


def _latex_sign(character: str) -> str:
    if character.isascii() or character == "√":
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    name = unicodedata.name(character, "").split()
    if name[:2] == ["VULGAR", "FRACTION"]:
        above, _, below = _plain(character).partition("/")
        return rf"\frac{{{above}}}{{{below}}}"
    if name[:1] == ["GREEK"] and len(name) == 4:
        return rf"\{name[3].capitalize() if name[1] == 'CAPITAL' else name[3].lower()} "
    return {"Zs": " ", "So": ""}.get(unicodedata.category(character), _plain(character))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\N{FRACTION SLASH}", "/").replace("\N{MINUS SIGN}", "-")
