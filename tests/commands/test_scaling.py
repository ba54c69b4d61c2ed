"""How a study's runs are started on each kind of cluster, and how its mistakes are told."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_sead.commands.scaling_launch import Cluster, find_cluster
from megatron_sead.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = "examples/scaling/tiny.yaml"
CONFIG_FILE = "examples/configs/sead_tiny.yaml"
CONFIG = Path("/runs/dp1/study-config.yaml")


def test_one_machine_starts_its_own_ranks() -> None:
    command = Cluster(1, None).command(CONFIG, 4, 0)
    assert command == [
        *(sys.executable, "-m", "megatron_sead.launch", "--standalone", "--nproc-per-node", "4"),
        *("-m", "megatron_sead.commands.scaling_rank", str(CONFIG)),
    ]


def test_nodes_that_a_run_does_not_need_have_no_part_in_it() -> None:
    first, third = (Cluster(4, 8, node, "node0", 4000) for node in (0, 2))
    command = first.command(CONFIG, 16, 3)
    assert command is not None and third.command(CONFIG, 16, 3) is None
    told = " ".join(command)
    assert "--node-rank 0 --master-addr node0 --nnodes 2 --master-port 4003 --nproc-per-node 8" in told
    assert first.most_ranks == 32


def test_ranks_that_nodes_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(UserError, match="9 ranks: cannot be shared evenly by 2 nodes of 8"):
        Cluster(2, 8).command(CONFIG, 9, 0)


def test_slurm_tells_each_node_the_first_ones_name_and_its_own_number(tmp_path: Path) -> None:
    """The shell's part, with stand-ins for Slurm and Python."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    command = Cluster(2, 8, slurm=True).command(CONFIG, 16, 1)
    assert command is not None and command[:4] == ["srun", "--nodes", "2", "--ntasks"]
    step = command[command.index("bash") :]
    step[step.index(sys.executable)] = "/bin/echo"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
    told = subprocess.run(step, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert told == (
        "-m megatron_sead.launch --node-rank 1 --master-addr n1 --nnodes 2 --master-port 29501 --nproc-per-node 8 "
        f"-m megatron_sead.commands.scaling_rank {CONFIG}"
    )


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"NNODES": "2"}, "NNODES=2: needs NODE_RANK from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "needs NODE_RANK from 0 to 1"),
        ({"NNODES": "x"}, "NNODES='x'"),
    ],
)
def test_nodes_without_a_place_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        find_cluster(False, 8, "cuda")


def test_slurm_outside_of_an_allocation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(UserError, match="within an allocation"):
        find_cluster(True, 8, "cuda")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--study", "nowhere.yaml", "--output", "{}"], "error: nowhere.yaml: cannot be read"),
        (
            ["run", "--study", TINY, "--output", "{}", "stepz=3"],
            "error: stepz: unknown setting",
        ),
        (["report", "{}"], "holds no study (study.yaml)"),
        (["run", "--study", TINY, "--output", "{}", "lengths=60,24"], "error: lengths=60,24: must be a mean"),
        (["predict", "--study", TINY, "--output", "{}", "lengths=60,24"], "error: lengths=60,24: must be a mean"),
        (["run", "--study", TINY, "--output", f"{TINY}/x"], f"--output {ROOT / TINY}/x: cannot be written"),
        (["predict", "--study", TINY, "--output", f"{TINY}/x"], f"--output {TINY}/x: cannot be written"),
        (["rollouts", "--config", CONFIG_FILE, "--output", "/proc/x", "--lengths", "9,20"], "--output /proc/x: cannot"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], told: str) -> None:
    place = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "tools/scaling.py", *(a.format(place) for a in arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path(place).exists()


def test_a_study_in_which_nothing_could_be_measured_has_failed(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"config: {CONFIG_FILE}\nlengths: 24,60\nruns: {{strong: [batch=33 tp=2, sp=maybe tp=2]}}\n")
    command = [sys.executable, "tools/scaling.py", "run", "--study", str(study), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = "error: nothing was measured: all 2 runs failed; --retry measures again what failed\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert "[1/2] tp=2 batch=33: failed: training.global_batch_size=33: must be" in done.stdout
    shutil.rmtree(tmp_path / "out" / "records")
    (tmp_path / "out" / "records").touch()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"error: --output {tmp_path}/out: cannot be written ({tmp_path}/out/records)")


def processes_of(output: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(output) in w for w in p.info["cmdline"] or ())]


def wait_until(seen: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_study_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out"
    given = ["settings=[training.micro_batch_size=8,rollouts.max_new_tokens=32]", "steps=1000", "lengths=24,60"]
    command = [sys.executable, "tools/scaling.py", "run", "--study", TINY, "--output", str(output), *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as study:
        try:
            wait_until(lambda: any(output.glob("runs/*/metrics.jsonl")), 120)
            assert len(processes_of(output)) >= 3  # the study, a launcher and a rank
        finally:
            study.send_signal(number)
        _, told = study.communicate(timeout=45)
    try:
        wait_until(lambda: not processes_of(output), 10)
    finally:
        for left in processes_of(output):
            left.kill()
    assert number == signal.SIGKILL or (study.returncode == 130 and told.startswith("stopped; the same command"))
    assert not list(output.glob("records/*"))
