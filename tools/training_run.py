"""A training run in processes of its own, for the tools that start many."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train(config: Path, ranks: int, settings: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A whole run of `settings` on top of `config`, a thread a rank; paths in them are from the repository's root."""
    command = [sys.executable, "-m", "megatron_sead.train", "--config", str(config), "--nproc-per-node", str(ranks)]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *settings], cwd=ROOT, env=threads, capture_output=True, text=True, check=False)
