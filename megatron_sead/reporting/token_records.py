"""What a step taught, token by token: ``tokens/step-N.json``, of a few steps and rollouts. Written and read here alone.

A file holds, under `all_tokens`, the statistics of tokens spread over the whole step, a list each; and under `rollouts`
some of them with everything that is known of each response token. `token_texts` are those of ids that stand nowhere
else. Nats have four digits, probabilities three.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text

FOLDER = "tokens"
STATISTICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")  # nats
# Of each response token of a rollout, beside zones and texts
COLUMNS = (*STATISTICS, "student_log_prob", "teacher_log_prob", "engine_log_prob", "forward_weight", "reverse_weight")
LIKELIEST = ("student_likeliest", "teacher_likeliest")  # a token: [id, probability by the student, by the teacher] each
MOST_POINTS = 1000  # of all_tokens
BYTES_A_TOKEN = 360  # of a rollout, at most but for long texts
LARGEST = 1e100  # number: what is larger or not finite no run has written
BYTES_A_STEP = 120_000  # of all_tokens and what else stands there once


def token_record_path(run_directory: Path, step: int) -> Path:
    """Where a step's tokens are, in a run directory."""
    return run_directory / FOLDER / f"step-{step}.json"


def recorded_steps(run_directory: Path) -> list[int]:
    """The steps that have a file, in order."""
    names = [path.stem.removeprefix("step-") for path in (run_directory / FOLDER).glob("step-*.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def write_token_record(path: Path, record: dict[str, Any]) -> None:
    """Write a step's tokens, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # What a model wrote may hold half of a character, which UTF-8 has not: then its escape stands in the string
    replace_text(path, text + "\n", errors="backslashreplace")


def read_token_record(path: Path) -> dict[str, Any]:
    """A step's tokens.

    Raises:
        UserError: it cannot be read, or is not what `write_token_record` wrote.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}") from None
    if problem := _problem(record):
        raise UserError(f"{path}: is no record of tokens: {problem}")
    assert isinstance(record, dict)
    return record


def _problem(record: Any) -> str | None:
    """What is wrong with it; None: nothing that a reader would stumble on."""
    if not isinstance(record, dict) or not isinstance(record.get("token_texts"), dict):
        return "has no token_texts"
    points, rollouts = record.get("all_tokens"), record.get("rollouts")
    if not isinstance(points, dict) or not isinstance(rollouts, list):
        return "has no all_tokens or rollouts"
    statistics = [points.get(name) for name in STATISTICS]
    if not _alike([points.get("zones"), *statistics]) or not all(map(_numbers, statistics)):
        return "all_tokens are not numbers, or not as many each"
    for number, rollout in enumerate(rollouts, 1):
        if not isinstance(rollout, dict):
            return f"rollout {number} is no object"
        columns = [rollout.get(name) for name in ("texts", "token_ids", "zones", *COLUMNS, *LIKELIEST)]
        if not _alike([column for column in columns if column is not None]) or columns[0] is None:
            return f"rollout {number} has not as many of each"
        if not all(map(_numbers, (rollout[name] for name in COLUMNS if name in rollout))):
            return f"rollout {number} has what is no number"
        if not isinstance(rollout.get("answers", []), list) or not _numbers([rollout.get("tokens")]):
            return f"rollout {number} has answers or a length that are none"
        if not all(_entries(rollout[name]) for name in LIKELIEST if name in rollout):
            return f"rollout {number} has alternatives that are none"
    return None


def _numbers(values: Any) -> bool:
    """Each a finite number, or None."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float, NoneType}:
        return False
    return all(value is None or abs(value) < LARGEST for value in values)


def _entries(tokens: Any) -> bool:
    """Of each token some of [id, probability, probability]."""
    if set(map(type, tokens)) != {list}:
        return len(tokens) == 0
    entries = list(chain.from_iterable(tokens))
    if set(map(type, entries)) != {list} or set(map(len, entries)) != {3}:
        return False
    return all(tokens) and _numbers(list(chain.from_iterable(entries)))


def _alike(columns: Iterable[Any]) -> bool:
    columns = list(columns)
    return all(isinstance(c, list | str) for c in columns) and len({len(c) for c in columns}) == 1


def rounded(values: Sequence[float], digits: int = 4) -> list[float | None]:
    """With so many significant digits; None: not finite."""
    found = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(found)
    sizes = np.abs(np.where(finite, found, 0.0))
    places = digits - 1 - np.floor(np.log10(np.where(sizes > 0, sizes, 1.0))).astype(int)
    # A quotient of whole numbers is the float nearest to the decimal number, which JSON writes shortest
    up, down = 10.0 ** np.clip(places, 0, 300), 10.0 ** np.clip(-places, 0, 300)
    short = np.round(np.where(finite, found, 0.0) * up / down) * down / up
    return [value if known else None for value, known in zip(short.tolist(), finite.tolist(), strict=True)]
