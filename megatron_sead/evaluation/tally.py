"""Answers with their grades in a file: a line each, appended as they come, so that nothing is lost whatever ends the
command, and nothing is asked twice."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sead.errors import UserError

Key = tuple[str, int]  # prompt id and sample
FIRST, LATER = b'{"measurement": {', b'{"prompt_id": "'  # how the first line begins, and how each other does
ADVICE = "move it away to start anew"


@dataclass(frozen=True)
class Graded:
    """What is known of one answer, beside its text."""

    prompt_id: str
    sample: int
    tokens: int  # the stop token included
    finished: bool  # False: cut at max_new_tokens
    correct: bool


class Tally:
    """The file of answers to one set of prompts: what they depend on in its first line, then a line an answer.

    Texts stay in the file: they may take gigabytes.

    Args:
        measurement: all that the answers depend on. What was begun with another is not continued.
        expected: the answers that may be in it.

    Raises:
        UserError: the file is not this command's, damaged (says in which line), or was begun with something else.
    """

    def __init__(self, path: Path, measurement: dict[str, Any], expected: Collection[Key]) -> None:
        self.path = path
        self.answers: dict[Key, Graded] = {}
        self._expected = frozenset(expected)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            whole = self._read(measurement)
            self._file.truncate(whole)  # an answer that a kill cut short is asked for again
            if not whole:
                self._append([{"measurement": measurement}])
        except BaseException:
            self._file.close()
            raise

    def add(self, answers: Iterable[tuple[Graded, str]]) -> None:
        """Keep answers and their texts; they are the system's when this returns."""
        answers = list(answers)
        self._append(
            {"prompt_id": graded.prompt_id, "sample": graded.sample, "response": text} | asdict(graded)
            for graded, text in answers
        )
        self.answers |= {(graded.prompt_id, graded.sample): graded for graded, _ in answers}

    def close(self) -> None:
        self._file.close()

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()

    def _read(self, measurement: dict[str, Any]) -> int:
        """Bytes that hold whole lines."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                begins = LATER if whole else FIRST
                if not line.startswith(begins) and not begins.startswith(line):
                    raise self._damaged(number)
                break
            if number == 1:
                self._require_same(self._header(line), measurement)
            else:
                self._take(line, number)
            whole += len(line)
        return whole

    def _header(self, line: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(line)["measurement"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged(1) from None

    def _take(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            text, graded = record.pop("response"), Graded(**record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged(number) from None
        kinds = [type(value) for value in (text, *asdict(graded).values())]
        if kinds != [str, str, int, int, bool, bool] or graded.tokens < 0:
            raise self._damaged(number)
        key = (graded.prompt_id, graded.sample)
        if key not in self._expected or key in self.answers:
            reason = "stands there twice" if key in self.answers else "was never asked for"
            raise UserError(
                f"{self.path}, line {number}: damaged: sample {key[1]} of prompt {key[0]!r} {reason}; {ADVICE}"
            )
        self.answers[key] = graded

    def _damaged(self, number: int) -> UserError:
        return UserError(f"{self.path}, line {number}: not written by this command, or damaged; {ADVICE}")

    def _require_same(self, earlier: dict[str, Any], measurement: dict[str, Any]) -> None:
        for key in sorted(earlier.keys() | measurement.keys()):
            if earlier.get(key) != measurement.get(key):
                before, now = (textwrap.shorten(repr(values.get(key)), 100) for values in (earlier, measurement))
                raise UserError(
                    f"{self.path}: was begun with {key}={before}, now {now}; use the same to continue, or {ADVICE}"
                )
