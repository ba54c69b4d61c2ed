"""Runs that do not fit their GPUs or nodes are refused, with what would help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_sead.commands.machine import machine_of
from megatron_sead.commands.plan import app
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.errors import UserError
from megatron_sead.planning.fit import Machine, host_needed, needed, require_fit
from megatron_sead.planning.plan import make_plan

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"
GIB = 2**30
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
SMALL_ENGINE = ["rollouts.gpu_memory_utilization=0.2", "rollouts.tensor_parallel_size=8"]
ONE = [f"{TP}=1", f"{PP}=1", "parallel.sequence_parallel=false"]


def planned(size: str, *overrides: str) -> RunConfig:
    shapes = [f"student.path={SHAPES / f'olmo3-{size}'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    return load_config(ROOT / f"examples/configs/sead_{size}.yaml", [*shapes, *overrides])


def refusal(config: RunConfig, world_size: int, machine: Machine = Machine()) -> str:  # noqa: B008
    with pytest.raises(UserError) as caught:
        require_fit(config, make_plan(config, world_size, machine.gpu_bytes), machine)
    return str(caught.value)


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_the_examples_fit(size: str) -> None:
    config = planned(size)
    require_fit(config, make_plan(config, 32), Machine())


def test_a_run_far_too_large_is_refused_by_stage_and_phase_with_the_nearest_layouts() -> None:
    lines = refusal(planned("32b", *ONE), 32).splitlines()
    assert re.match(r"pipeline stage 0, phase \w[\w ]*: needs \d+\.\d\d GiB of a GPU's 80\.00 GiB", lines[0])
    assert "nearest layouts of 32 ranks that fit: tensor" in lines[-1]
    assert len(re.findall(r"tensor \d+ x pipeline \d+ x data \d+", lines[-1])) == 3


def test_layouts_that_are_named_fit() -> None:
    config = planned("32b", *ONE)
    tp, pp = re.findall(r"tensor (\d+) x pipeline (\d+)", refusal(config, 32))[0]
    sequence = f"parallel.sequence_parallel={str(int(tp) > 1).lower()}"
    other = planned("32b", f"{TP}={tp}", f"{PP}={pp}", sequence)
    require_fit(other, make_plan(other, 32), Machine())


@pytest.mark.parametrize(
    ("size", "overrides", "gpu", "help_"),
    [
        ("32b", ["training.recompute_granularity=null"], 56, "training.recompute_granularity=full"),
        ("7b", ["teacher.offload=false", "rollouts.gpu_memory_utilization=0.8"], 76, "teacher.offload=true"),
        ("7b", ["rollouts.gpu_memory_utilization=0.95"], 80, "rollouts.gpu_memory_utilization=0.8"),
        ("32b", ["training.use_distributed_optimizer=false"], 70, "training.use_distributed_optimizer=true"),
        (
            "7b",
            ["training.micro_batch_tokens=null", "training.micro_batch_size=12", *SMALL_ENGINE],
            25,
            "training.micro_batch_size=1",
        ),
        (
            "7b",
            ["training.micro_batch_tokens=221184", *SMALL_ENGINE],
            25,
            "training.micro_batch_tokens=18432",
        ),
    ],
)
def test_a_setting_that_would_make_it_fit_is_named(size: str, overrides: list[str], gpu: int, help_: str) -> None:
    machine = Machine(gpu * GIB)
    assert help_ in refusal(planned(size, *overrides), 32, machine)


def test_offloading_the_teacher_lowers_every_phase_but_its_own() -> None:
    stays, goes = (make_plan(planned("7b", f"teacher.offload={v}"), 32).stages[0] for v in ("false", "true"))
    assert stays.phases["teacher"] == goes.phases["teacher"]
    assert all(stays.phases[phase] > goes.phases[phase] for phase in stays.phases if phase != "teacher")
    assert stays.teacher_weights_host == 0 < goes.teacher_weights_host


def test_a_node_whose_host_memory_is_too_small_is_refused() -> None:
    assert "host memory: a node's ranks need" in refusal(planned("32b"), 32, Machine(host_bytes=100 * GIB))


def test_an_allowance_for_fragmentation_and_libraries_is_made() -> None:
    config = planned("7b", "rollouts.gpu_memory_utilization=0.05", "rollouts.tensor_parallel_size=8")
    (stage,) = make_plan(config, 32).stages
    phase, size = stage.peak
    assert needed(stage) == (phase, size + int(0.03 * size) + 3 * GIB // 2)
    assert "of tensors, 3% for fragmentation, 1.50 GiB for CUDA and NCCL" in refusal(config, 32, Machine(size))


def test_a_run_on_a_cpu_has_no_gpu_to_fill_and_all_of_it_is_on_the_host() -> None:
    config = planned("32b", *ONE, "device=cpu")
    require_fit(config, make_plan(config, 1), Machine(GIB))
    assert "all of the run, which is on the CPU" in refusal(config, 1, Machine(GIB, 500 * GIB))
    goes, stays = (make_plan(planned("32b", *ONE, "device=cpu", f"teacher.offload={v}"), 1) for v in ("true", "false"))
    assert goes.stages == stays.stages


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["rollouts.gpu_memory_utilization=0.1"],
            "vLLM is given 8.00 GiB of a GPU (rollouts.gpu_memory_utilization=0.1)",
        ),
        (["rollouts.kv_cache_memory_bytes=100000000"], "(rollouts.kv_cache_memory_bytes=100000000, and its weights)"),
    ],
)
def test_an_engine_without_room_for_its_weights_and_one_rollout_is_refused(overrides: list[str], told: str) -> None:
    line, *rest = refusal(planned("7b", *overrides), 32).splitlines()
    assert line.startswith("phase rollouts: ") and told in line
    if overrides[0].startswith("rollouts.gpu"):
        assert "rollouts.gpu_memory_utilization=0." in rest[0] or "rollouts.tensor_parallel_size=8" in rest[0]


def test_stages_that_do_not_fit_are_told_in_one_line() -> None:
    config = planned("32b", f"{PP}=4", "training.recompute_granularity=null")
    lines = refusal(config, 32, Machine(20 * GIB)).splitlines()
    assert [line.startswith("pipeline stage") for line in lines].count(True) == 1
    assert "other stages too" in lines[0]


def test_only_the_first_replica_of_a_rank_writes_and_needs_memory_for_it() -> None:
    one, four = (host_needed(config, make_plan(config, ranks)) for ranks in (8, 32) for config in [planned("7b")])
    assert one >= four > 0
    stage = make_plan(planned("7b"), 32).stages[0]
    assert stage.host(writes=True) > stage.host(writes=False) > stage.teacher_weights_host


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80", 80 * GIB),
        ("80GB", 80 * GIB),
        ("80 GiB", 80 * GIB),
        ("81920MiB", 80 * GIB),
        ("0.5T", 512 * GIB),
        (".5g", GIB // 2),
    ],
)
def test_sizes_are_in_gb_as_gpus_are_sold(text: str, size: int) -> None:
    assert machine_of(text, "2TB") == Machine(size, 2048 * GIB)


@pytest.mark.parametrize(
    "text",
    ["0", "0MB", "-80", "", " ", "eighty", "80XB", "80B", "80,5", "nan", "inf", "1e400", "85899345920", "8_0", "٣"],
)
def test_what_is_no_size_is_told_in_one_line(text: str) -> None:
    for option, sizes in (("gpu_memory", (text, "2000")), ("host_memory", ("80", text))):
        if (option, text) == ("host_memory", "85899345920"):
            continue
        with pytest.raises(UserError, match=f"^{option}=.*: must be a size in GB, as ") as caught:
            machine_of(*sizes)
        assert "\n" not in str(caught.value) and option.upper() in str(caught.value)


@pytest.mark.parametrize("size", ["40", "40GB"])
def test_the_command_prints_the_plan_and_ends_with_code_2(size: str) -> None:
    arguments = ["--config", str(ROOT / "examples/configs/sead_32b.yaml"), "--gpu-memory", size]
    arguments += [f"{role}.path={SHAPES / 'olmo3-32b'}" for role in ("student", "teacher")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "peak of phase: training pass" in result.output and "of a GPU's 40.00 GiB" in result.output
