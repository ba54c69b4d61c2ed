"""One of four ranks fails, in any phase of a run: all end within 30 s, and its error is the one that is shown, once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training.failing_ranks import PHASES, RANKS, run_failing

FIRST_KINDS = ("bug", "mistake", "disk", "killed")
CASES = [
    (phase, FIRST_KINDS[number % 4], (number + number // 4) % RANKS) for number, phase in enumerate(PHASES)
]  # each kind on each rank, more or less
LINE = {
    "mistake": "error: training.lr=-1: must be positive\n",
    "disk": "cannot be written (/full/disk): No space left on device",
    "bug": "KeyError: 'a bug'\n",
}


@pytest.mark.parametrize(("phase", "kind", "rank"), CASES, ids=lambda value: str(value))
def test_all_ranks_end_and_the_first_error_is_shown_once(tmp_path: Path, phase: str, kind: str, rank: int) -> None:
    ended = run_failing(tmp_path, phase, kind, rank)
    told = [line for line in ended.told.splitlines(keepends=True) if line[:2] != "20" and line[2:3] != ":"]  # the log
    if kind == "killed":
        code = 1
        assert ended.codes[rank] == -signal.SIGKILL, ended.told
        assert not told, "its launcher tells that"
    else:
        code = 1 if kind == "bug" else 2
        assert ended.codes[rank] == code, ended.told
        assert ended.told.count(LINE[kind]) == 1, ended.told
        assert len(told) == 1 or kind == "bug", ended.told
        assert ended.told.count("Traceback") == (kind == "bug"), ended.told
    assert [c for r, c in enumerate(ended.codes) if r != rank] == [code] * (RANKS - 1), ended.told
    assert ended.seconds < 30
