"""Run directories for tests, written without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_sead.distillation.zone_shares import LETTERS
from megatron_sead.reporting.token_records import COLUMNS, STATISTICS, token_record_path, write_token_record

CONFIG = """\
output: run
device: cpu
seed: {seed}
student: {{path: models/student}}
teacher: {{path: models/teacher}}
prompts: {{path: problems.jsonl}}
training: {{steps: {steps}, global_batch_size: 8, lr: 0.001}}
rollouts: {{engine: {engine}, max_new_tokens: 40, mismatch_warning: 0.1}}
policy: {{name: {policy}}}
curriculum: {{mode: gated}}
zones: {{shares: [50, 40, 10], teacher_entropy_floor: 0.01}}
"""


def write_run(
    directory: Path,
    *,
    steps: int = 30,
    planned: int | None = None,
    seed: int = 0,
    policy: str = "sead",
    engine: str = "transformers",
    accuracy: float | None = 0.75,
    token_steps: tuple[int, ...] = (0, 29),
    rollouts: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    """A run that went well, but for what is asked.

    Args:
        accuracy: after training; None: the run has not ended.
        changes: of every line of metrics.jsonl.
    """
    directory.mkdir(parents=True)
    config = CONFIG.format(seed=seed, steps=planned or steps, engine=engine, policy=policy)
    (directory / "config.yaml").write_text(config)
    lines = [json.dumps(metrics(step, seed) | changes) for step in range(steps)]
    (directory / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    start = {"time": "2026-01-01T00:00:00+00:00", "command": "train.py", "step": 0, "ranks": 2, "prompts": 1000}
    start |= {"versions": {"torch": "2.13"}, "machine": {"cpu": "a cpu", "cores": 2, "python": "3.11"}, "gpu": None}
    (directory / "starts.jsonl").write_text(
        json.dumps(start | {"plan": {"phase": "train", "peak_bytes": 2**30}}) + "\n"
    )
    for step in token_steps:
        write_token_record(token_record_path(directory, step), token_record(step, rollouts))
    if accuracy is not None:
        write_results(directory, steps, accuracy, seed)
    return directory


def metrics(step: int, seed: int = 0) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    rate = min(1.0, 0.4 + step / 100 + 0.02 * seed)
    line: dict[str, Any] = {"step": step, "skipped": False, "alpha": 0.8, "pass_rate": rate, "competence": rate}
    line |= {"loss": 1 / (1 + step), "grad_norm": 2.0 + math.sin(step), "forward_kl": 0.2, "reverse_kl": 0.4}
    line |= {"student_entropy": 0.3, "teacher_entropy": 0.25, "tau_student": 0.1, "tau_teacher": 0.7}
    line |= {"eligible_prompts": min(1000, 250 + 40 * step), "eligible_difficulty": 0.5, "response_tokens": 200}
    line |= {"student_stop_probability": 0.95, "teacher_stop_probability": 0.97, "truncated_share": 0.02}
    line |= {"repetition_share": 0.0, "confident_mismatch_rate": 0.01, "response_length": 25.0}
    line |= {"sampling_log_prob_difference": 1e-6, "peak_memory": 0.6, "tokens_per_second": 1000.0}
    line |= {f"{phase}_seconds": 0.2 for phase in ("rollout", "score", "train", "sync", "step")}
    line |= {"seconds": 10.0 + step}
    for zone, share, mass in (("a", 0.5, 0.1), ("b", 0.4, 0.6), ("c", 0.1, 0.3)):
        line |= {
            f"zone_{zone}_share": share,
            f"zone_{zone}_forward_kl_share": mass,
            f"zone_{zone}_reverse_kl_share": mass,
        }
        line |= {f"zone_{zone}_student_entropy": share, f"zone_{zone}_teacher_entropy": share}
    return line


def write_results(directory: Path, steps: int, accuracy: float, seed: int, prompts: int = 40) -> None:
    """summary.json and heldout.json, which agree."""
    right = {"before": 0.4, "after": accuracy, "teacher": 1.0}
    rates = {
        name: [float((i * 7 + seed) % prompts < share * prompts) for i in range(prompts)]
        for name, share in right.items()
    }
    found = {}
    for name, values in rates.items():
        mean = sum(values) / prompts
        told = {
            "mean": mean,
            "standard_error": math.sqrt(mean * (1 - mean) / prompts),
            "truncated": 0.0,
            "prompts": prompts,
        }
        found[name] = {
            "greedy": told,
            "sampled": told,
            "greedy_by_level": {"1": told, "2": told},
            "sampled_by_level": {},
        }
    summary: dict[str, Any] = {f"accuracy_{name}": sum(values) / prompts for name, values in rates.items()}
    summary |= {"steps": steps, "seconds": 40.0, "evaluation": found}
    (directory / "summary.json").write_text(json.dumps(summary))
    heldout = {"prompts": [f"h{i}" for i in range(prompts)]} | {
        n: {"greedy": v, "sampled": v} for n, v in rates.items()
    }
    (directory / "heldout.json").write_text(json.dumps(heldout))


def token_record(step: int, rollouts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Of one step."""
    letters = "AABBC" * 20
    points: dict[str, Any] = {name: [0.01 * i for i in range(100)] for name in STATISTICS}
    shown = [rollout()] if rollouts is None else rollouts
    record = {"step": step, "alpha": 0.5, "tokens": 100, "all_tokens": points | {"zones": letters}}
    return record | {"token_texts": {"7": " other"}, "rollouts": shown}


def rollout(texts: tuple[str, ...] = ("The", " answer", " is", " 4", "<|end|>"), **changes: Any) -> dict[str, Any]:
    """As tokens/step-N.json has it."""
    count = len(texts)
    found: dict[str, Any] = {"prompt_id": "p1", "sample": 0, "question": "2+2=", "answers": ["4"], "level": "1"}
    found |= {"difficulty": 0.5, "correct": True, "finished": True, "repeated": False, "tokens": count}
    found |= {"token_ids": list(range(count)), "texts": list(texts), "zones": "AABBC"[:count].ljust(count, "A")}
    assert set(found["zones"]) <= set(LETTERS.values())
    found |= {name: [0.125 * (i + 1) for i in range(count)] for name in COLUMNS}
    found |= {
        name: [[[i, 0.5, 0.25], [7, 0.3, 0.2]] for i in range(count)]
        for name in ("student_likeliest", "teacher_likeliest")
    }
    return found | changes
