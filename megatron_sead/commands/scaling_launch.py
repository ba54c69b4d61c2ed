"""How the ranks of a study's runs are started: on this machine, on nodes by hand, or by Slurm's srun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_sead.config.environment import environment_number
from megatron_sead.errors import ArgumentError, UserError

RANK = "megatron_sead.commands.scaling_rank"
FIRST_PORT = 29500
# Each node's task learns the first node's name and its own number from Slurm
ON_A_NODE = (
    'exec "$0" -m megatron_sead.launch --node-rank "$SLURM_NODEID" '
    '--master-addr "$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)" "$@"'
)


@dataclass(frozen=True)
class Cluster:
    """The nodes that there are."""

    nodes: int
    per_node: int | None  # ranks; None: any number of processes
    node: int = 0  # this one's number
    address: str = ""  # the first node's, where nodes are started by hand
    port: int = FIRST_PORT
    slurm: bool = False

    @property
    def most_ranks(self) -> int | None:
        return None if self.per_node is None else self.nodes * self.per_node

    def command(self, config: Path, ranks: int, number: int) -> list[str] | None:
        """What starts a run on this node; None: the run is too small to need it.

        Each run has a port of its own: one that has just ended may still hold its.

        Raises:
            UserError: the run does not fill its nodes evenly.
        """
        nodes = 1 if self.per_node is None else -(-ranks // self.per_node)
        if ranks % nodes:
            raise UserError(f"{ranks} ranks: cannot be shared evenly by {nodes} nodes of {self.per_node}")
        ours = ["--nproc-per-node", str(ranks // nodes), "-m", RANK, str(config.resolve())]
        where = ["--nnodes", str(nodes), "--master-port", str(self.port + number % 1000)]
        if self.slurm:
            step = ["srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]
            return [*step, "--kill-on-bad-exit=1", "bash", "-c", ON_A_NODE, sys.executable, *where, *ours]
        launch = [sys.executable, "-m", "megatron_sead.launch"]
        if self.nodes == 1:
            return [*launch, "--standalone", *ours]
        if self.node >= nodes:
            return None
        return [*launch, "--node-rank", str(self.node), "--master-addr", self.address, *where, *ours]


def find_cluster(slurm: bool, ranks_per_node: int | None, device: str) -> Cluster:
    """From the options and the variables NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT of the run scripts, or Slurm's.

    Raises:
        UserError: what they say does not go together.
    """
    per_node = ranks_per_node or (_gpus() if device == "cuda" else None)
    if slurm:
        nodes = environment_number("SLURM_JOB_NUM_NODES")
        if nodes is None or shutil.which("srun") is None:
            raise ArgumentError("slurm", "true", "must be given within an allocation: sbatch or salloc, then srun")
        return Cluster(nodes, per_node or 1, slurm=True)
    nodes = environment_number("NNODES", 1) or 1
    if nodes == 1:
        return Cluster(1, per_node)
    node, address = environment_number("NODE_RANK", least=0), os.environ.get("MASTER_ADDR", "")
    if node is None or node >= nodes or not address:
        raise UserError(f"NNODES={nodes}: needs NODE_RANK from 0 to {nodes - 1}, another on each node, and MASTER_ADDR")
    return Cluster(nodes, per_node or 1, node, address, environment_number("MASTER_PORT", FIRST_PORT) or FIRST_PORT)


def _gpus() -> int:
    """
    Raises:
        UserError: this machine has none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([device for device in visible.split(",") if device.strip()])
    else:
        try:
            told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
            count = len(told.splitlines())
        except (OSError, subprocess.CalledProcessError):
            count = 0
    if count == 0:
        raise UserError(
            "device=cuda: this machine shows no GPU; on a node without, name the others' by --ranks-per-node"
        )
    return count
