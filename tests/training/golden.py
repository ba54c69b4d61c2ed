"""Golden trajectories: what ten steps of the tiny pair gave when golden.json was last renewed.

``python -m tests.training.golden`` (``make golden``) runs them again, prints what changed, and writes the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_sead.files.durable import replace_text
from tests.distributed.ranks import RankPools
from tests.training.launching import metrics_of, train_tiny

GOLDEN = Path(__file__).with_name("golden.json")
# Relative. Measured: 5e-6 at worst in gradient norms and 1e-6 elsewhere, with the vector instructions of other
# processors (ATEN_CPU_CAPABILITY=default; MKL and oneDNN held to SSE4); nothing with other numbers of threads. Counts
# and shares of them must be equal, as the next one is farther away.
BOUND = 1e-5

STEPS = 10
SETTINGS = [
    f"training.steps={STEPS}",
    # Of a gradient that is all rounding error, Adam with its default of 1e-8 makes a whole step, and within ten of
    # them two processors' gradient norms are 2e-5 apart
    "training.adam_eps=1e-3",
]
RUNS = {
    "sead": [],  # the quickstart: zones, a gate that opens in the first steps, annealing from 0.8 to nearly 0
    "opd": ["policy.name=opd", "curriculum.mode=none"],
}
METRICS = (
    *("loss", "grad_norm", "active_tokens", "learning_rate", "alpha"),
    *("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"),
    *("tau_teacher", "zone_a_share", "zone_b_share", "zone_c_share"),
    *("eligible_prompts", "pass_rate", "finished_share", "response_tokens"),
)

Trajectory = list[dict[str, Any]]  # a dictionary a step, of METRICS


def trajectory(name: str, pools: RankPools, output: Path) -> Trajectory:
    """Run the steps on one rank: the student writes, so that engine, grades and curriculum count as well."""
    assert train_tiny(pools, 1, output, [*SETTINGS, *RUNS[name]]) == [True]
    return [{key: line[key] for key in METRICS} for line in metrics_of(output)]


def stored() -> dict[str, Trajectory]:
    """By the run's name; empty where the file is not there yet."""
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def changes(golden: Trajectory, found: Trajectory) -> list[str]:
    """A line for each metric that is not what it was: the first step where it differs, and by how much at worst."""
    if len(golden) != len(found):
        return [f"{len(found)} steps, and {len(golden)} before"]
    lines = []
    for key in METRICS:
        pairs = [(before.get(key), after.get(key)) for before, after in zip(golden, found, strict=True)]
        off = [difference(*pair) for pair in pairs]
        worst = max(off)
        if worst > BOUND:
            first = next(step for step, value in enumerate(off) if value > BOUND)
            before, after = pairs[first]
            lines.append(
                f"{key} of step {first}: {before} -> {after}; at worst {worst:.1e} relative, step {off.index(worst)}"
            )
    return lines


def difference(before: float | None, after: float | None) -> float:
    """Relative; infinite where one is missing or no number."""
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return 0.0 if before == after else math.inf
    return abs(after - before) / max(abs(before), abs(after), 1e-300)


def renew() -> None:
    """Run, write the file, and print what changed since."""
    golden, found, pools = stored(), {}, RankPools()
    try:
        for name in RUNS:
            with TemporaryDirectory() as folder:
                found[name] = trajectory(name, pools, Path(folder) / "run")
    finally:
        pools.stop()
    runs = [
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, steps)) + "\n ]" for name, steps in found.items()
    ]
    replace_text(GOLDEN, "{\n " + ",\n ".join(runs) + "\n}\n")
    for name in RUNS:
        for line in (changes(golden[name], found[name]) if name in golden else ["new"]) or ["as before"]:
            print(f"{name}: {line}")


if __name__ == "__main__":
    renew()
