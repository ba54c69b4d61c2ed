"""Our TRL subclass beside TRL's own trainer. Runs where TRL 1.16 is, not under pytest.

With all weight on one divergence, SEAD's loss is the one that TRL's DistillationTrainer has at ``beta`` 0 or 1: same
rollouts, losses and gradient norms are then expected step by step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "loss"))

from trl import DistillationTrainer
from trl_trainer import SeadTrainer, arguments_for_tiny_pair


def history(trainer: type, steps: int, beta: float = 1.0, **more: Any) -> list[dict[str, Any]]:
    """The trainer's log, one entry a step, of a run on the tiny pair."""
    with tempfile.TemporaryDirectory() as output:
        arguments = arguments_for_tiny_pair(output, steps)
        arguments["args"].beta = beta
        run = trainer(**arguments, **more)
        run.train()
        return [entry for entry in run.state.log_history if "loss" in entry]


if __name__ == "__main__":
    results = {
        "opd": history(SeadTrainer, 3, policy="opd"),
        "trl_reverse": history(DistillationTrainer, 3, beta=1.0),
        "forward_kl": history(SeadTrainer, 3, policy="forward_kl"),
        "trl_forward": history(DistillationTrainer, 3, beta=0.0),
        "random_half": history(SeadTrainer, 1, policy="random_half"),
        "sead": history(SeadTrainer, 18, policy="sead"),
    }
    Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")
