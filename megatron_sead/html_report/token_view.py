"""Rollouts token by token, for the page's script: as many as the file has room for, spread over the recorded steps."""

from __future__ import annotations

import json
from itertools import zip_longest
from typing import Any

from megatron_sead.html_report.series import short
from megatron_sead.html_report.token_figures import Records, spread

MOST_BYTES = 1_900_000  # of all runs of a report together
LEAST_BYTES_A_TOKEN = 150  # as the page has them: what cannot fit is not turned into it
# Short names, since they stand there once a rollout: of the record, digits that are shown
COLUMNS = {
    "student_entropy": "hs",
    "teacher_entropy": "ht",
    "forward_kl": "fk",
    "reverse_kl": "rk",
    "student_log_prob": "ls",
    "teacher_log_prob": "lt",
    "engine_log_prob": "le",
    "forward_weight": "wf",
    "reverse_weight": "wr",
}
ALTERNATIVES = {"student_likeliest": "as", "teacher_likeliest": "at"}
DIGITS = 3
DIGITS_OF_LOGS = 5  # of which the page shows two or three digits of the probability


def token_view(records: Records, room: int = MOST_BYTES) -> dict[str, Any]:
    """The rollouts that are shown, the last steps first, and the texts of tokens that stand in no response.

    Each step's first rollout comes before any step's second, and the last and first step before those between.
    """
    shown, texts, recorded = list[dict[str, Any]](), dict[str, str](), 0
    steps = _in_order_of_interest(list(records))
    for nth in zip_longest(*(records[step]["rollouts"] for step in steps)):
        for step, rollout in zip(steps, nth, strict=True):
            if rollout is None:
                continue
            recorded += 1
            if room < LEAST_BYTES_A_TOKEN * len(rollout["texts"]):
                continue
            told = _told(step, rollout)
            named = {i: records[step]["token_texts"].get(i, f"<{i}>") for i in _alternatives(told)}
            room -= len(json.dumps(told)) + sum(len(json.dumps(t)) + 10 for i, t in named.items() if i not in texts)
            if room < 0:
                continue
            shown.append(told)
            texts |= named
    shown.sort(key=lambda rollout: -rollout["step"])  # what the run came to first
    return {"rollouts": shown, "texts": texts, "recorded": recorded}


def _in_order_of_interest(steps: list[int]) -> list[int]:
    """The last, the first, then ever finer between."""
    order = dict[int, None]()
    for count in (1, 2, 3, 5, 9, 17, len(steps)):
        order |= dict.fromkeys(steps[-1:] if count == 1 else spread(steps, count))
    return list(order)


def _told(step: int, rollout: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "step": step,
        "prompt": str(rollout.get("prompt_id", "")),
        "question": str(rollout.get("question", "")),
        "answers": [str(answer) for answer in rollout.get("answers") or ()],
        "level": None if rollout.get("level") is None else str(rollout["level"]),
        "right": bool(rollout.get("correct")),
        "end": "repeated" if rollout.get("repeated") else "finished" if rollout.get("finished") else "cut",
        "tokens": int(rollout.get("tokens") or len(rollout["texts"])),
        "ids": rollout.get("token_ids") or [],
        "texts": [str(text) for text in rollout["texts"]],
        "zones": str(rollout.get("zones", "")),
    }
    for name, brief in COLUMNS.items():
        if name in rollout:
            digits = DIGITS_OF_LOGS if name.endswith("log_prob") else DIGITS
            told[brief] = [short(value, digits) for value in rollout[name]]
    for name, brief in ALTERNATIVES.items():
        if name in rollout:
            told[brief] = [[[e[0], short(e[1], DIGITS), short(e[2], DIGITS)] for e in token] for token in rollout[name]]
    return told


def _alternatives(told: dict[str, Any]) -> set[str]:
    return {str(entry[0]) for brief in ALTERNATIVES.values() for token in told.get(brief, ()) for entry in token}
