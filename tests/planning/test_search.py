"""The fastest configuration that fits a cluster, of all that a search may choose."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_sead.commands.plan import app
from megatron_sead.config.checks import check_world_size
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.errors import UserError
from megatron_sead.planning import candidates
from megatron_sead.planning.candidates import Cluster, Pair, engines, layouts, modes, read_pair, with_changes
from megatron_sead.planning.fit import Machine, require_fit
from megatron_sead.planning.plan import make_plan
from megatron_sead.planning.rates import load_rates
from megatron_sead.planning.room import outer_stages, room_for_engine, what_does_not_fit
from megatron_sead.planning.search import Found, predicted, search, twice
from megatron_sead.planning.seconds import setting_of

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"
GIB = 2**30


@pytest.fixture(autouse=True)
def _fewer_choices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "thousands" not in request.node.name:
        monkeypatch.setattr(candidates, "BUDGETS", (1, 2))
        monkeypatch.setattr(candidates, "VIRTUAL", (2,))
        monkeypatch.setattr(candidates, "ENGINES", (1, 8))


def arguments(size: str) -> list[str]:
    return [f"student.path={SHAPES / f'olmo3-{size}'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]


def config_of(size: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / f"examples/configs/sead_{size}.yaml", [*arguments(size), *overrides])


@cache
def pair_of(size: str) -> Pair:
    return read_pair(config_of(size), "2000,12000")


def cluster_of(world: int, gpu: int = 80) -> Cluster:
    return Cluster(world, Machine(gpu * GIB), load_rates())


@cache
def found_for(size: str, world: int) -> Found:
    return search(config_of(size), pair_of(size), cluster_of(world))


@pytest.mark.parametrize(("size", "world"), [("7b", 8), ("32b", 32)])
def test_what_is_found_is_accepted_and_fits_as_it_is_printed(size: str, world: int) -> None:
    found, cluster = found_for(size, world), cluster_of(world)
    assert len(found.candidates) > 3
    for candidate in found.candidates[:6]:
        config = config_of(size, *candidate.settings)  # every check that settings have
        check_world_size(config, world)
        require_fit(config, make_plan(config, world), cluster.machine)
        assert predicted(config, pair_of(size), cluster).seconds == pytest.approx(candidate.prediction.seconds)
        assert candidate.needed <= cluster.machine.gpu_bytes


def test_the_fastest_is_first_and_every_layout_is_there_once() -> None:
    found = found_for("7b", 8)
    told = [candidate.prediction.seconds for candidate in found.candidates]
    assert told == sorted(told)
    names = [tuple(sorted(s for s in c.settings if "_parallel_size" in s)) for c in found.candidates]
    assert len(set(names)) == len(names)


def test_ranks_share_sequences_where_these_are_long() -> None:
    found = {s for c in found_for("32b", 32).candidates for s in c.settings if "context_parallel_size" in s}
    assert found == {"parallel.context_parallel_size=1", "parallel.context_parallel_size=2"}
    short = config_of("32b", "rollouts.max_new_tokens=8192", "prompts.max_prompt_tokens=2048")
    pair = read_pair(short, "1000,6000")
    assert {x["parallel.context_parallel_size"] for x in layouts(short, pair, cluster_of(32))} == {1}


def test_no_candidate_that_fits_is_faster() -> None:
    """Beside a search that counts the bytes of all."""
    config, pair, cluster = config_of("7b"), pair_of("7b"), cluster_of(8)
    fastest = float("inf")
    for layout in layouts(config, pair, cluster):
        within = with_changes(config, layout)
        for mode in modes(within, pair):
            for engine in engines(config, pair, cluster):
                changed = with_changes(within, mode | engine)
                stages = outer_stages(changed, pair, cluster)
                where = setting_of(changed, cluster.world, cluster.rates)
                changed = with_changes(changed, room_for_engine(where, stages, pair, cluster)[1])
                if what_does_not_fit(changed, pair, cluster) is None:
                    fastest = min(fastest, predicted(changed, pair, cluster).seconds)
    found = search(config, pair, cluster)
    assert found.candidates[0].prediction.seconds == pytest.approx(fastest)
    best = search(config, pair, cluster, best_only=True)
    assert best.candidates[0].prediction.seconds == pytest.approx(fastest)
    assert best.counted <= found.counted < found.tried


def test_thousands_of_gpus_take_seconds() -> None:
    started = time.process_time()
    pair = read_pair(config_of("32b"), None)
    found = search(config_of("32b", "training.global_batch_size=3072"), pair, cluster_of(4096))
    assert len(found.candidates) > 20
    assert time.process_time() - started < 30  # 12 on a busy core


def test_more_memory_more_bandwidth_and_more_gpus_are_never_slower() -> None:
    config, pair, cluster = config_of("7b"), pair_of("7b"), cluster_of(8)
    fastest = found_for("7b", 8).candidates[0].prediction.seconds
    richer = [
        cluster_of(8, 141),
        replace(cluster, rates=cluster.rates.model_copy(update={"memory_gb": 4000.0})),
        replace(cluster, rates=cluster.rates.model_copy(update={"node_link_gb": 900.0})),
    ]
    for other in richer:
        assert search(config, pair, other, best_only=True).candidates[0].prediction.seconds <= fastest
    doubled = twice(config, pair, cluster)
    assert isinstance(doubled, Found) and doubled.candidates[0].prediction.seconds < fastest


def test_what_more_memory_would_bring_is_told() -> None:
    found = search(config_of("32b"), pair_of("32b"), cluster_of(32, 60))
    assert found.missed is not None
    seconds, settings, why = found.missed
    assert seconds < found.candidates[0].prediction.seconds
    assert "parallel.tensor_model_parallel_size" in settings[0] and "needs" in why


def test_rows_and_other_engines_are_searched_too() -> None:
    rows = config_of("7b", "training.micro_batch_tokens=null", "rollouts.engine=transformers")
    settings = search(rows, pair_of("7b"), cluster_of(32)).candidates[0].settings
    assert {s.partition("=")[0] for s in settings} >= {"training.micro_batch_size", "rollouts.batch_size"}
    assert not any("vllm" in s or "gpu_memory" in s or "micro_batch_tokens" in s for s in settings)


@pytest.mark.parametrize(
    ("overrides", "world", "gpu", "part"),
    [
        ([], 1, 80, r"no layout of 1 ranks fits; the fastest that does not is parallel\.tensor.* needs \d+"),
        ([], 8, 10, r"no layout of 8 ranks fits; .* needs .* of a GPU's 10\.00 GiB"),
        (["training.global_batch_size=1"], 4096, 80, r"is possible: training\.global_batch_size=1: must be at least"),
    ],
)
def test_a_cluster_on_which_nothing_fits_is_told_in_one_line(
    overrides: list[str], world: int, gpu: int, part: str
) -> None:
    with pytest.raises(UserError, match=part) as caught:
        search(config_of("7b", *overrides), pair_of("7b"), cluster_of(world, gpu))
    assert "\n" not in str(caught.value)


# --- The command ------------------------------------------------------------------------------------------------------


def run(*options: str) -> tuple[int, str]:
    config = ["--config", str(ROOT / "examples/configs/sead_7b.yaml"), "--world-size", "8"]
    result = CliRunner().invoke(app, [*config, *options, *arguments("7b")])
    return result.exit_code, result.output


def test_the_command_prints_settings_to_paste_what_binds_and_twice_the_gpus() -> None:
    code, told = run("--search", "--rows", "2", "--lengths", "2000,12000")
    assert code == 0
    (first,) = re.findall(r"^1: .*?; (.*)$", told, re.MULTILINE)
    assert first.split() == found_for("7b", 8).candidates[0].settings
    assert re.search(r"^2: ", told, re.MULTILINE) and not re.search(r"^3: ", told, re.MULTILINE)
    assert "what binds: " in told and re.search(r"^16 ranks: [\d.]+ s, [\d.]+ times as fast", told, re.MULTILINE)


def test_the_command_explains_every_term() -> None:
    code, told = run("--explain", "rollouts.gpu_memory_utilization=0.3")
    assert code == 0 and "peak of phase" in told
    plain = " ".join(told.replace("│", " ").split())
    assert "pipeline bubble" not in plain
    for word in ("decoding", "heads' products", "Adam", "checkpoint", "tensor-parallel messages", "at 600 TFLOP/s"):
        assert all(part in plain for part in word.split()), word


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--search", "--rate", "speed=3"], "speed: unknown setting"),
        (["--search", "--rate", "memory_gb=0"], "memory_gb=0"),
        (["--search", "--lengths", "1,2,3"], "--lengths 1,2,3"),
        (["--search", "--calibrate", "nowhere@2"], "--calibrate nowhere@2: nowhere has no config.yaml"),
        (["--search", "--gpu-memory", "10"], "no layout of 8 ranks fits"),
        (["--search", "--rates", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--rate", "memory_gb=2"], "--rate memory_gb=2: tells seconds, which --search"),
    ],
)
def test_a_mistake_ends_the_command_with_code_2(options: list[str], part: str) -> None:
    code, told = run(*options)
    assert code == 2 and part in told and "Traceback" not in told
