r"""What a closing sentence says the result is: 42 in "Therefore, x = 42.", "The total is $42." and "So 42 apples."."""

from __future__ import annotations

import re

LONGEST = 300  # characters; a longer line is no closing sentence
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_DELIMITERS = re.compile(r"\$|\\[()\[\]]")
_OPENING = re.compile(
    r"(?:(?:and\s+)?(?:so|thus|hence|therefore|finally|consequently|overall|in\s+(?:total|all|conclusion|summary)|altogether"
    r"|as\s+a\s+result|this\s+means|it\s+follows|we\s+(?:get|find|conclude|obtain)|this\s+gives)(?:\s+that)?,?:?\s+)+",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"(?<!\\)\b(?:not|no|never|cannot|neither|nor|if|unless|whether|suppose|assum\w+|let|lets|try|check|guess|perhaps|maybe"
    r"|might|may|could|would|should|doubt|question|wrong|incorrect|wait|hmm|case|step|first|next|least|most|than|between|about"
    r"|approximately|nearly|almost|around|over|under|minus|negative|hundred|thousand|[mbtr]+illion|dozen|percent|times"
    r"|half|divides|divisible|multiple|factor|page)\b|n't|n’t",
    re.IGNORECASE,
)
_SAID = re.compile(r"(.*)\s(?<!\bthere\s)(?:is|are|was|were|equals?|is\s+equal\s+to)\s+(\S.*)", re.IGNORECASE)
_IS_THE_ANSWER = re.compile(
    r"(?:option\s+|choice\s+)?(\S+)\s+is\s+(?:the\s+|our\s+|my\s+)?(?:(?:final|correct|right)\s+)*"
    r"(?:answer|result|solution|option|choice|correct)",
    re.IGNORECASE,
)
_NAME = (  # x, AB, f(2), a_5, \angle ABC, m + n, Area, Total cost; not xy, a product
    r"(?:(?![a-z]{2}\b|[xyz]{2,}\b)(?:\\?[A-Za-z]+'?(?:_\{?\w+\}?)?(?:\(\w+\))?|\\angle\s*[A-Z]+|[a-w](?:\s*\+\s*[a-w])+"
    r"|\\(?:sin|cos|tan)\s*\\?[A-Za-z]+|[A-Za-z][A-Za-z']+(?:\s+[A-Za-z']+)*))"
)
_ARITHMETIC = r"(?:[\d\s+*/().,^{}$-]|\\(?:times|cdot|div|d?frac))+"
_LEFT_SIDE = re.compile(rf"{_NAME}|{_ARITHMETIC}")
_NUMBER = re.compile(r"(?<![\w.,/^*+:=\\{(-])-?\d+(?:,\d{3})*(?:\.\d+)?%?(?![\w/^*+:={(\\]|[.,]\d)")


def stated(text: str) -> str:
    """The value behind the last "is" of a sentence, or behind its last equality sign; "" where it states none."""
    if len(text) > LONGEST or raises_doubt(text):
        return ""
    if (answer := _IS_THE_ANSWER.fullmatch(text)) is not None:
        return answer[1]
    if (said := _SAID.fullmatch(text)) is not None:
        return said[2]
    *sides, value = (side.strip() for side in _DELIMITERS.sub("", text).split("="))
    says_so = sides and _LEFT_SIDE.fullmatch(sides[0]) and all(re.fullmatch(_ARITHMETIC, side) for side in sides[1:])
    return value if says_so else ""


def raises_doubt(text: str) -> bool:
    """Whether a sentence supposes, asks or denies, or bounds what it speaks of."""
    return _DOUBT.search(text) is not None


def conclusion(line: str) -> str:
    """What the last sentence of a line concludes; "" when it concludes nothing.

    Behind a word such as "therefore" the only number of the sentence counts, too.
    """
    sentence = _SENTENCE.split(line[-LONGEST:])[-1].rstrip(".! ")
    opening = _OPENING.match(sentence)
    rest = sentence[opening.end() :] if opening else sentence
    value = stated(rest)
    if value or opening is None or raises_doubt(rest):
        return value
    numbers = [] if re.search(r"[<>=≤≥≠|\\]", rest) else _NUMBER.findall(rest)
    return numbers[0] if len(numbers) == 1 and len(re.findall(r"\d[\d.,]*", rest)) == 1 else ""
