"""The arithmetic between raw records and what is reported. Records here are made up, so that it can be done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.errors import UserError
from megatron_sead.scaling.conclusion import conclusion
from megatron_sead.scaling.records import (
    Numbers,
    best_by_ranks,
    bubble,
    efficiency,
    furthest,
    numbers_of,
    read_records,
    same_workload,
    write_records,
)
from megatron_sead.scaling.report import markdown


def record(
    name: str = "dp2", ranks: int = 2, seconds: tuple[float, ...] = (9.0, 2.0, 3.0, 2.5, 40.0), **more: Any
) -> dict[str, Any]:
    """Five steps of 100 response tokens: one of warm-up, three that count, one that is watched."""
    steps, since = [], 50.0  # start-up
    for number, duration in enumerate(seconds):
        since += duration
        line = {"step": number, "seconds": since, "response_tokens": 100, "loss": 2.0 - number / 10, "grad_norm": 1.0}
        steps.append(line | {"rollout_seconds": 0.5, "score_seconds": 0.25, "train_seconds": 1.0, "sync_seconds": 0.0})
    process = {
        "micro_batches": [4] * 5,
        "padded_tokens": [150] * 5,
        "cpu_seconds": [9.0, 1.0, 1.5, 1.25],
        "collectives": [{"group": "dp", "name": "allreduce_", "calls": 3, "bytes": 800}],
        "tensors_peak": {"host": 1000},
        "resident_peak": 5000,
    }
    layout = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "dp": ranks, "sp": False}
    return {
        "name": name,
        "text": f"dp={ranks}",
        "kind": "measured",
        "ranks": ranks,
        "layout": layout,
        "settings": {"training.global_batch_size": 8, "device": "cpu", "parallel.tensor_model_parallel_size": 1},
        "warm_up": 1,
        "watched": 1,
        "steps": steps,
        "recorded": [{"rollouts": 8, "responses": 100, "all": 240}] * 5,
        "processes": [process | {"rank": rank} for rank in range(ranks)],
        "plan": {"phase": "training pass", "peak_bytes": 2000},
        "machine": {"cpu": "x", "cores": 2},
        "date": "2026-01-01",
        "versions": {"torch": "2.13.0"},
        "code": "abc",
        "load": [0.1, 0.2],
    } | more


def numbers(speed: float, **layout: int) -> Numbers:
    sizes = {"tp": 1, "pp": 1, "cp": 1, "dp": 1, "vpp": None, "sp": False} | layout
    ranks = int(sizes["tp"] * sizes["pp"] * sizes["dp"])  # type: ignore[operator]
    name = " ".join(f"{key}={value}" for key, value in layout.items()) or "dp=1"
    return Numbers(name, name, "measured", ranks, sizes, tokens_per_second=speed)


def test_neither_warm_up_nor_the_watched_step_counts() -> None:
    own = numbers_of(record())
    assert (own.fastest, own.slowest) == (2.0, 3.0)
    assert own.tokens_per_second == 100 / 2.5


def test_a_step_lasts_from_the_end_of_the_one_before_and_its_phases_add_up_to_it() -> None:
    own = numbers_of(record())
    assert own.seconds == 2.5 == pytest.approx(sum(own.phases.values()))
    assert own.phases["other"] == pytest.approx(2.5 - 1.75)


def test_a_row_is_of_one_step_also_of_an_even_number() -> None:
    made = record(seconds=(9.0, 2.0, 4.0, 40.0))
    own = numbers_of(made)
    assert (own.seconds, own.tokens_per_second, own.cpu_seconds) == (2.0, 100 / 2.0, 2 * 1.0)
    assert (own.fastest, own.slowest, sum(own.phases.values())) == (2.0, 4.0, pytest.approx(2.0))


def test_tokens_are_counted_once_whatever_the_ranks_and_padding_is_told_apart() -> None:
    own = numbers_of(record())
    assert (own.tokens, own.all_tokens, own.per_rank) == (100, 240, own.tokens_per_second / 2)
    assert own.padding == pytest.approx(1 - 240 / 300)  # two replicas of 150
    shared = record(ranks=2)
    shared["layout"] |= {"tp": 2, "dp": 1}
    for process in shared["processes"]:
        process["padded_tokens"] = [300] * 5
    assert numbers_of(shared).padding == pytest.approx(1 - 240 / 300)  # both ranks see the same 300
    split = record(ranks=2)
    split["layout"] |= {"cp": 2, "dp": 1}
    assert numbers_of(split).padding == pytest.approx(1 - 240 / 300)  # each sees its 150 of every sequence


def test_memory_and_traffic_are_those_of_the_rank_that_has_most() -> None:
    made = record()
    made["processes"][1] = made["processes"][1] | {"tensors_peak": {"host": 3000}, "collectives": []}
    own = numbers_of(made)
    assert (own.memory, own.planned_memory, own.groups) == (3000, 2000, {"dp": (3, 800)})
    assert own.cpu_seconds == 2 * 1.25
    made["processes"][0]["allocated_peak"] = 7000
    assert numbers_of(made).memory == 7000


def test_a_whole_record_is_read(tmp_path: Path) -> None:
    write_records(tmp_path, [record(), record("dp4", 4, reason="it broke", steps=None, processes=None)])
    assert set(read_records(tmp_path)) == {"dp2", "dp4"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": ...}, "settings: Field required"),
        ({"layout": {}}, "layout: tp: Field required"),
        ({"steps": ...}, "steps: Field required"),
        ({"steps": []}, "steps: 0, of which none counts after warm_up=1"),
        ({"steps": record()["steps"][:1]}, "steps: 1, of which none counts after warm_up=1"),
        ({"steps": [record()["steps"][0] | {"seconds": None}]}, "steps: 0: seconds: Input should be a valid number"),
        ({"steps": [record()["steps"][0] | {"response_tokens": 0}]}, "response_tokens: Input should be greater than"),
        ({"warm_up": 5}, "steps: 5, of which none counts after warm_up=5"),
        ({"warm_up": "x"}, "warm_up: Input should be a valid integer"),
        ({"processes": []}, "processes: 0, of 2 ranks"),
        ({"recorded": []}, "must hold a number for each of 4 steps"),
        ({"text": "foo"}, "'foo': must be NAME=VALUE"),
        ({"name": "dp3"}, "name: 'dp3', and the file has another"),
        ({"kind": "predicted"}, "predicted: Field required"),
    ],
)
def test_a_damaged_record_is_told_in_one_line_that_names_the_file(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    damaged = {key: value for key, value in (record() | change).items() if value is not ...}
    path = tmp_path / "records" / "dp2.json"
    path.parent.mkdir()
    path.write_text(json.dumps(damaged))
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_bubble_is_that_of_the_schedule() -> None:
    assert (bubble(1, 1, 4), bubble(4, 1, 4), bubble(4, 2, 4)) == (0.0, 3 / 7, 3 / 11)


def test_efficiency_is_per_rank_against_the_best_of_the_fewest_ranks() -> None:
    runs = [numbers(80, tp=2), numbers(100, dp=2), numbers(150, dp=4)]
    assert efficiency(runs) == {"tp=2": 0.8, "dp=2": 1.0, "dp=4": 0.75}
    assert [run.name for run in best_by_ranks(runs)] == ["dp=2", "dp=4"]


def test_curves_differ_by_their_worst_step_and_infinitely_where_one_has_no_number() -> None:
    assert furthest([1.0, 2.0, -4.0], [1.0, 2.5, -4.0]) == pytest.approx(0.2)
    assert furthest([1.0, None], [1.0, 1.0]) == float("inf")


def test_curves_are_compared_of_runs_that_compute_the_same() -> None:
    other = record("dp4", 4)
    other["settings"] = other["settings"] | {"training.micro_batch_size": 2}
    third = record("lr", 2, text="dp=2 training.lr=1e-5")
    third["settings"] = third["settings"] | {"training.lr": 1e-5}
    (group,) = same_workload([numbers_of(r) for r in (other, record(), third)])
    assert [run.name for run in group] == ["dp2", "dp4"]


def test_the_conclusion_names_the_fastest_and_what_binds_beyond_it() -> None:
    runs = [numbers(100), numbers(190, tp=2), numbers(360, tp=4), numbers(380, tp=8), numbers(700, tp=4, dp=2)]
    runs[3].groups = {"tp": (100, 5e6)}
    said = conclusion(runs, None)
    assert said.startswith("TP 4 x DP 2 is fastest of 5 layouts: 700 tokens a second, 7.00 times that of 1 rank on 8 ")
    assert "beyond TP 4 the link binds, or waiting at it: 100 collectives of 5 MB" in said
    assert "DP" not in said.partition(";")[2]


def test_the_conclusion_says_when_ranks_share_cores_and_when_stages_wait() -> None:
    assert "beyond DP 2 the 2 cores bind, which 4 ranks share" in conclusion([numbers(100, dp=2), numbers(90, dp=4)], 2)
    staged = [numbers(100), numbers(120, pp=2)]
    staged[1].bubble = 0.4
    assert "beyond PP 1 the bubble binds, 40% of a training pass" in conclusion(staged, None)
    assert conclusion([], None) == "No layout of strong scaling was measured."


def test_the_report_tells_what_failed_and_which_records_do_not_belong_together() -> None:
    made = {"a": record("a"), "b": record("b", 4, code="other"), "c": record("c", 8, reason="it broke")}
    made["b"]["steps"][3]["grad_norm"] = 1.25
    text = markdown({"strong": [numbers_of(r) for r in made.values()]}, made, "Said.", {})
    assert "- `dp=8`: it broke" in text and "**Records of different code stand beside each other.**" in text
    assert "| dp=4 | dp=2 | 0.0e+00 | 2.0e-01 | 0.0e+00 | 0.0e+00 |" in text  # the first step's are the last two
    assert "| dp=2 | 2 | 100 | 2.5 (2 to 3) | 40 | 20.0 | 100% |" in text
