"""Writes ``tokens/step-N.json``: what a few rollouts taught, token by token, and the statistics of the whole step's.

Cheap, since everything but the likeliest tokens was computed for the loss, and those are taken of few tokens. It reads
what a step leaves and changes nothing of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_sead.config.run import ReportingSettings, RunConfig
from megatron_sead.distillation import LikeliestTokens
from megatron_sead.distillation.zone_shares import LETTERS
from megatron_sead.reporting.token_records import (
    BYTES_A_STEP,
    BYTES_A_TOKEN,
    LIKELIEST,
    MOST_POINTS,
    STATISTICS,
    rounded,
    token_record_path,
    write_token_record,
)
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.training.run import Run
from megatron_sead.training.seen_tokens import NOBODY, SeenTokens, Watch

Numbers = dict[str, torch.Tensor]  # [n] each
Columns = dict[str, list[Any]]  # of a rollout's tokens, in the order of `position`


def watched(config: RunConfig, step: int, rollouts: list[Rollout]) -> Watch:
    """Which rollouts of a step to look at, by what `reporting` says: spread over the step, as many as fit. The same on
    every rank."""
    settings, steps = config.reporting, config.training.steps
    if step not in steps_to_record(settings.token_steps, steps):
        return NOBODY
    room = _tokens_that_fit(settings, steps)
    count, lengths = min(settings.token_rollouts, len(rollouts)), [len(r.response_token_ids) for r in rollouts]
    chosen, left = list[int](), room
    for number in (place * len(rollouts) // count for place in range(count)):
        if lengths[number] <= left or not chosen:
            chosen.append(number)
            left -= min(left, lengths[number])
    return Watch(tuple(chosen), room)


def steps_to_record(count: int, steps: int) -> set[int]:
    """So many of the run's steps, evenly spread; of two and more the first and the last are among them."""
    if count == 1:
        return {steps - 1}
    return {round(place * (steps - 1) / (count - 1)) for place in range(count)} if count else set()


def _tokens_that_fit(settings: ReportingSettings, steps: int) -> int:
    """Of rollouts, in the file of a step."""
    share = settings.token_megabytes * 1e6 / max(1, min(settings.token_steps, steps))
    return max(0, int(share - BYTES_A_STEP) // BYTES_A_TOKEN)


def record_tokens(
    run: Run,
    step: int,
    rollouts: list[Rollout],
    correct: list[bool],
    alpha: float,
    watch: Watch,
    seen: SeenTokens | None,
) -> None:
    """Write the step's tokens on the first rank, from the ranks that saw them. Collective.

    Args:
        watch: as `watched` has it; of `NOBODY` nothing is written.
        seen: None: this rank saw none, or the step was skipped.
    """
    if watch is NOBODY:
        return
    mine: tuple[dict[str, list[Any]], dict[int, Columns]] = ({}, {})
    if seen is not None and run.parallel.tp_rank == run.parallel.cp_rank == 0:
        numbers = seen.numbers()
        mine = _points(numbers, seen.zones, run.parallel.dp_size), _of_rollouts(seen, numbers, watch)
    parts: list[Any] | None = [None] * run.parallel.world_size if run.parallel.rank == 0 else None
    dist.gather_object(mine, parts, dst=0, group=run.parallel.control)
    if parts is None:
        return
    texts = run.token_texts
    columns = {index: found for _, share in parts for index, found in share.items()}
    told = [_told(run, rollouts[i], correct[i], columns[i]) for i in watch.rollouts if i in columns]
    record = {
        "step": step,
        "alpha": alpha,
        "tokens": sum(len(rollout.response_token_ids) for rollout in rollouts),
        "all_tokens": _joined([points for points, _ in parts]),
        "token_texts": {str(token): texts.of(token) for token in sorted(_ids(told))},
        "rollouts": told,
    }
    write_token_record(token_record_path(run.config.output, step), record)


def _points(numbers: Numbers, zones: torch.Tensor, ranks: int) -> dict[str, list[Any]]:
    """Statistics of every so manieth of this rank's tokens."""
    every = max(1, math.ceil(len(zones) * ranks / MOST_POINTS))
    found: dict[str, list[Any]] = {name: rounded(numbers[name][::every].tolist()) for name in STATISTICS}
    return found | {"zones": [LETTERS[zone] for zone in zones[::every].tolist()]}


def _joined(parts: list[dict[str, list[Any]]]) -> dict[str, Any]:
    joined: dict[str, Any] = {name: [v for part in parts for v in part.get(name, ())] for name in STATISTICS}
    return joined | {"zones": "".join(letter for part in parts for letter in part.get("zones", ()))}


def _of_rollouts(seen: SeenTokens, numbers: Numbers, watch: Watch) -> dict[int, Columns]:
    """Everything about the tokens of watched rollouts that this rank saw."""
    rollout_index = seen.tokens.rollout_index
    places = watch.sees(rollout_index, seen.tokens.position).nonzero().squeeze(1)
    columns: Columns = {name: rounded(values[places].tolist()) for name, values in numbers.items()}
    columns["zones"] = [LETTERS[zone] for zone in seen.zones[places].tolist()]
    columns |= _likeliest(seen.likeliest(), places)
    found: dict[int, Columns] = {}
    for row, index in enumerate(rollout_index[places].tolist()):
        for name, values in columns.items():
            found.setdefault(index, {}).setdefault(name, []).append(values[row])
    return found


def _likeliest(likeliest: LikeliestTokens | None, places: Any) -> Columns:
    if likeliest is None:
        return {}
    ids, student, teacher = likeliest.ids, likeliest.student_log_prob.exp(), likeliest.teacher_log_prob.exp()
    found: Columns = {}
    for model, name in enumerate(LIKELIEST):
        chosen = ids[places, model]
        probabilities = (rounded(of[places, model].flatten().tolist(), 3) for of in (student, teacher))
        rows = list(zip(chosen.flatten().tolist(), *probabilities, strict=True))
        k = chosen.shape[1]
        found[name] = [rows[first : first + k] for first in range(0, len(rows), k)]
    return found


def _told(run: Run, rollout: Rollout, right: bool, columns: Columns) -> dict[str, Any]:
    """A rollout as its record has it."""
    prompt, kept = run.prompt_of(rollout), len(columns["zones"])
    told: dict[str, Any] = {
        "prompt_id": rollout.prompt_id,
        "sample": rollout.sample,
        "question": prompt.text,
        "answers": list(prompt.answers),
        "level": prompt.level,
        "difficulty": prompt.difficulty,
        "correct": right,
        "finished": rollout.finished,
        "repeated": rollout.repeated,
        "tokens": len(rollout.response_token_ids),
        "token_ids": list(rollout.response_token_ids[:kept]),
        "texts": run.token_texts.of_all(rollout.response_token_ids)[:kept],
        "zones": "".join(columns["zones"]),
    }
    if rollout.log_probs is not None:
        told["engine_log_prob"] = rounded(rollout.log_probs[:kept])
    return told | {name: columns[name] for name in sorted(columns.keys() - {"zones"})}


def _ids(told: list[dict[str, Any]]) -> set[int]:
    """Of all alternatives."""
    return {entry[0] for rollout in told for name in LIKELIEST for token in rollout.get(name, ()) for entry in token}
