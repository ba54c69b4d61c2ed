r"""Where LaTeX solutions mark their answer: ``\boxed{...}``. Imports nothing; prompts and grading both read boxes."""


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` (or ``\fbox{...}``) that closes holds, braces balanced; None without one."""
    contents = boxed(text)
    return contents[-1] if contents else None


def boxed(text: str) -> list[str]:
    r"""What every outermost ``\boxed{...}`` or ``\fbox{...}`` that closes holds, in order."""
    contents: list[str] = []
    place = 0
    while True:
        starts = [start for mark in (r"\boxed{", r"\fbox{") if (start := text.find(mark, place)) >= 0]
        if not starts:
            return contents
        opening = text.index("{", min(starts))
        closing = _closing_brace(text, opening)
        if closing is not None:
            contents.append(text[opening + 1 : closing])
        place = opening + 1 if closing is None else closing


def _closing_brace(text: str, opening: int) -> int | None:
    depth, escaped = 0, False
    for i in range(opening, len(text)):
        character = text[i]
        if not escaped and character == "{":
            depth += 1
        elif not escaped and character == "}":
            depth -= 1
            if depth == 0:
                return i
        escaped = character == "\\" and not escaped
    return None
