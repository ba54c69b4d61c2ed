"""Every start of a run: when, by which command, on what. ``starts.jsonl``, a line a start."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_sead.reporting.machine import machine

STARTS = "starts.jsonl"


def append_start(run_directory: Path, told: dict[str, Any]) -> None:
    """Add a start of this process, with what the run itself tells of it."""
    record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv)}
    record |= told | {"machine": machine()}
    with open(run_directory / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
