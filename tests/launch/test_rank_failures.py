"""Of several failures the first is known to all ranks; on another node it is one line there too."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import NoReturn

import pytest
from torch.distributed import TCPStore

from megatron_sead.errors import UserError
from megatron_sead.launch import rank_failures
from megatron_sead.launch.rank_failures import fail

GONE = 2**22 + 1  # no process has this number


class Left(Exception):
    """Instead of the end of the process; its text is the exit code."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    def leave(code: int) -> NoReturn:
        raise Left(str(code))

    monkeypatch.setattr(rank_failures, "leave", leave)
    monkeypatch.setattr(rank_failures, "TELLING", 0.0)
    monkeypatch.setattr(rank_failures, "ECHO", 1.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return store


def fail_as(rank: int, code: int, error: Exception) -> str:
    """The exit code."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2)}
    with pytest.raises(Left) as left:
        fail(code, f"error: {error}", error)
    return str(left.value)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")


def test_the_first_failure_is_told_once_a_node_and_its_code_is_everybodys(
    store: TCPStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_as(3, 2, UserError("training.lr=-1")) == "2"
    assert capsys.readouterr().err == "error: training.lr=-1\n"
    assert fail_as(2, 1, KeyError("on the same node")) == "2"
    assert capsys.readouterr().err == ""
    assert fail_as(0, 1, RuntimeError("gloo: Connection closed by peer")) == "2"
    assert capsys.readouterr().err == "error: rank 3 failed on another node: error: training.lr=-1\n"
    assert fail_as(1, 1, KeyError("second of that node")) == "2"
    assert capsys.readouterr().err == ""


def test_an_error_that_a_killed_rank_causes_is_not_told_as_the_first(
    store: TCPStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.set(rank_failures._key("process/1"), json.dumps([GONE, 5.0]))
    error = UserError("the checkpoint cannot be written")
    error.__cause__ = RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
    assert fail_as(0, 2, error) == "1"
    assert capsys.readouterr().err == ""


def test_an_echo_without_a_cause_is_told(store: TCPStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_as(0, 1, RuntimeError("gloo: Connection reset by peer")) == "1"
    assert capsys.readouterr().err == "error: gloo: Connection reset by peer\n"


def test_without_the_store_an_error_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch, store: TCPStore, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    assert fail_as(0, 2, UserError("seed=-1")) == "2"
    assert capsys.readouterr().err.endswith("error: seed=-1\n")
