"""Ranks of a real run, one of which fails where a test says: started without torchrun, which would end the others."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch.distributed import TCPStore

from megatron_sead.commands import train
from megatron_sead.commands.cli import one_line_errors_on_ranks
from megatron_sead.config.run import load_config
from megatron_sead.errors import UserError
from tests.distributed.ranks import forkserver
from tests.training.launching import SHORT, TINY

RANKS = 4
SETTINGS = [
    *SHORT,
    "parallel.tensor_model_parallel_size=2",
    "training.steps=2",
    "training.lr_warmup_steps=0",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "rollouts.max_new_tokens=8",
    "checkpoints.interval=1",
    f"evaluation.path={TINY.parents[1] / 'tiny' / 'heldout.jsonl'}",
    "evaluation.limit=4",
    "evaluation.samples=0",
]

# A phase of a run: who has the function and its name, and which call of it fails
PHASES = {
    "setup": ("training.setup", "build_learner", 1),
    "evaluation": ("training.setup", "evaluate_student", 1),
    "generate": ("rollouts.transformers_engine:TransformersEngine", "generate", 2),  # the first is the evaluation's
    "grade": ("training.run:Run", "grade", 1),
    "observe": ("training.run:Run", "observe", 1),
    "teacher": ("training.teacher:Teacher", "hidden_states", 2),
    "student scores": ("training.step", "score_student", 1),
    "loss": ("training.scoring:Heads", "loss", 2),
    "optimizer": ("training.step", "_update", 1),
    "load engine": ("training.run:Run", "load_engine", 2),  # the first is the setup's
    "record": ("training.loop", "record_step", 1),
    "save": ("checkpoints.store:dist_checkpointing", "save", 1),
    "conclude": ("training.conclude", "verify_huggingface_directory", 1),
}


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")


def user_error() -> None:
    raise UserError("training.lr=-1: must be positive")


def bug() -> None:
    raise KeyError("a bug")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KINDS: dict[str, Callable[[], None]] = {"bug": bug, "mistake": user_error, "disk": full_disk, "killed": killed}


@dataclass
class Ended:
    """How the ranks ended."""

    codes: list[int | None]  # None: had to be killed
    seconds: float  # from the failure to the end of the last
    told: str  # what all of them wrote on stderr


def run_failing(folder: Path, phase: str, kind: str, failing: int) -> Ended:
    """The ranks of a run, of which one fails; as torchrun starts them, but nobody ends them."""
    context = forkserver()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_rank, args=(rank, port, folder, phase, kind, rank == failing)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    marker = folder / "failed"
    deadline = time.monotonic() + 240
    while not marker.exists() and time.monotonic() < deadline and any(process.is_alive() for process in ranks):
        time.sleep(0.05)
    failed = time.monotonic()
    for process in ranks:
        process.join(max(0.0, failed + 30 - time.monotonic()))
    seconds = time.monotonic() - failed
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    del meeting
    told = "".join((folder / f"{rank}.txt").read_text() for rank in range(RANKS))
    return Ended(codes, seconds, told if marker.exists() else f"nothing has failed\n{told}")


def _rank(rank: int, port: int, folder: Path, phase: str, kind: str, fails: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if fails:
        _inject(*PHASES[phase], KINDS[kind], folder / "failed")
    train._configure_logging("cpu")
    with one_line_errors_on_ranks():
        train._train(load_config(TINY, [*SETTINGS, f"output={folder / 'run'}"]))


def _inject(place: str, name: str, call: int, fault: Callable[[], None], marker: Path) -> None:
    owner = resolve_name(f"megatron_sead.{place}")
    inner, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            marker.touch()
            fault()
        return inner(*args, **kwargs)

    setattr(owner, name, failing)
