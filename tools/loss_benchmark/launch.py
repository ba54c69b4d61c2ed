"""Starts the rank processes of one pass and hands on what rank 0 says."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Memory that is not used goes back to the system at once, so that what is resident is what is live
HIDES_NOTHING = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
}


def run_ranks(python: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Messages of rank 0, in order; a last one of kind "died" if a rank ended early.

    Args:
        python: the interpreter that runs the ranks.
        settings: what `worker.main` reads, without the store.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "settings.json")
        path.write_text(json.dumps(settings | {"store": str(Path(folder, "store"))}), encoding="utf-8")
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(settings["tp"])]
        ranks = [_start(python, path, rank, log, settings) for rank, log in enumerate(logs)]
        try:
            assert ranks[0].stdout is not None
            for line in ranks[0].stdout:
                yield json.loads(line)
                if any(rank.poll() for rank in ranks):
                    break
            codes = [_end(rank) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            tail = logs[failed[0]].read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            yield {"kind": "died", "reason": f"rank {failed[0]} ended with {codes[failed[0]]}: {''.join(tail)}"}


def _start(python: str, settings_path: Path, rank: int, log: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    threads = str(settings["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    if settings["measure"] == "memory":
        environment |= HIDES_NOTHING
    with log.open("w", encoding="utf-8") as stderr:
        return subprocess.Popen(
            [python, str(HERE / "worker.py"), str(settings_path), str(rank)],
            stdout=subprocess.PIPE if rank == 0 else stderr,
            stderr=stderr,
            env=environment,
            text=True,
        )


def _end(rank: subprocess.Popen[str]) -> int:
    try:
        return rank.wait(timeout=60)
    except subprocess.TimeoutExpired:  # waits for a rank that is gone
        return 1
