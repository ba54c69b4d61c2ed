"""Rollouts on disk: ``rollouts/step-N.jsonl``, one JSON object a rollout. Written and read here alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text
from megatron_sead.rollouts.engine import Rollout

FOLDER = "rollouts"
ValueT = TypeVar("ValueT")


def record_path(run_directory: Path, step: int) -> Path:
    """Where a step's rollouts are, in a run directory."""
    return run_directory / FOLDER / f"step-{step}.jsonl"


def write_records(path: Path, rollouts: Sequence[Rollout], extras: Sequence[dict[str, Any]] | None = None) -> None:
    """Write all rollouts of a step, whole or not at all.

    Args:
        extras: more keys for each rollout, for people and plots: text, correct, zones as a string like "ABCA".
            Reading leaves them out. They must not be named as a field of `Rollout`.
    """
    lines = []
    for rollout, extra in zip(rollouts, extras or [{}] * len(rollouts), strict=True):
        record = {
            "prompt_id": rollout.prompt_id,
            "sample": rollout.sample,
            "finished": rollout.finished,
            "repeated": rollout.repeated,
            "prompt_token_ids": rollout.prompt_token_ids,
            "response_token_ids": rollout.response_token_ids,
            "log_probs": rollout.log_probs,
        }
        if clash := record.keys() & extra.keys():
            raise ValueError(f"extras must not be named as fields of a rollout: {', '.join(sorted(clash))}")
        lines.append(json.dumps(record | extra, ensure_ascii=False, allow_nan=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a model wrote may hold half of a character, which UTF-8 has not: then its escape stands in the string
    replace_text(path, "".join(lines), errors="backslashreplace")


def read_records(path: Path) -> list[Rollout]:
    """All rollouts of a file, in its order.

    Raises:
        UserError: the file is missing or empty, or a line is not a rollout (names the line).
    """
    try:
        # Not splitlines(): a response may hold line separators such as U+2028, which end no line of the file
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: recorded rollouts cannot be read: {reason}") from None
    if lines == [""]:
        raise UserError(f"{path}: holds no rollouts")
    return [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _read_line(line: str, place: str) -> Rollout:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: not a rollout: must be a JSON object, not {type(record).__name__}")
    try:
        log_probs = record["log_probs"]
        rollout = Rollout(
            prompt_id=str(_only((str, int), record["prompt_id"], "prompt_id")),
            sample=_only(int, record["sample"], "sample"),
            prompt_token_ids=_all_only(int, record["prompt_token_ids"], "prompt_token_ids"),
            response_token_ids=_all_only(int, record["response_token_ids"], "response_token_ids"),
            finished=_only(bool, record["finished"], "finished"),
            log_probs=None if log_probs is None else _finite(log_probs),
            repeated=_only(bool, record.get("repeated", False), "repeated"),
        )
    except KeyError as error:
        raise UserError(f"{place}: not a rollout: has no {error}") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{place}: not a rollout: {error}") from None
    if not rollout.prompt_token_ids or not rollout.response_token_ids:
        raise UserError(f"{place}: not a rollout: prompt and response must hold at least one token each")
    if rollout.log_probs is not None and len(rollout.log_probs) != len(rollout.response_token_ids):
        counts = f"{len(rollout.log_probs)} log_probs for {len(rollout.response_token_ids)} response tokens"
        raise UserError(f"{place}: not a rollout: {counts}")
    if not all(map(math.isfinite, rollout.log_probs or ())):
        raise UserError(f"{place}: not a rollout: its log_probs are not all finite")
    return rollout


def _only(kind: type[ValueT] | tuple[type[ValueT], ...], value: Any, name: str) -> ValueT:
    """Just these types: int("7"), int(7.5) and bool("false") would make something of what was not written here."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{name} must be {' or '.join(k.__name__ for k in kinds)}, not {value!r:.60}")
    return value


def _all_only(kind: type[ValueT], values: Any, name: str) -> tuple[ValueT, ...]:
    return tuple(_only(kind, value, name) for value in _only(list, values, name))


def _finite(values: Any) -> tuple[float, ...]:
    values = [float(value) if type(value) is int else value for value in _only(list, values, "log_probs")]
    if not all(map(math.isfinite, _all_only(float, values, "log_probs"))):
        raise ValueError("log_probs must be finite")
    return tuple(values)
