"""Words of messages that more than one part needs."""


def counted(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks", "2 batches"."""
    plural = noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
