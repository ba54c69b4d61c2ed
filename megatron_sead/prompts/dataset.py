"""Prompt sets: rows of a JSONL or parquet file, or of a hub data set, as prompts with ids, answers and tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One problem."""

    id: str
    text: str
    answers: tuple[str, ...]  # more than one: all must be given
    difficulty: float | None  # 1 - pass rate of the initial student
    level: str | None
    student_token_ids: tuple[int, ...]
    teacher_token_ids: tuple[int, ...]
