"""Predicted seconds: terms that a hand can compute, and what must hold whatever the rates are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.planning.decoding import Segment, segments
from megatron_sead.planning.lengths import Lengths
from megatron_sead.planning.micro_batches import micro_batches
from megatron_sead.planning.rates import Rates, load_rates
from megatron_sead.planning.remembered import RememberedShape, remembered_shape
from megatron_sead.planning.seconds import MEASURED, PHASES, Prediction, predict

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"
TP, PP, VPP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "virtual_pipeline"))
ALONE = [f"{TP}=1", "parallel.sequence_parallel=false", "training.recompute_granularity=null"]
RATES = load_rates()
EQUAL = Lengths((1000,), 24.0, "all alike")


@cache
def shape(size: str) -> RememberedShape:
    return remembered_shape(config_of("7b").student.model_copy(update={"path": SHAPES / f"olmo3-{size}"}), "student")


def config_of(size: str, *overrides: str) -> RunConfig:
    paths = [f"student.path={SHAPES / f'olmo3-{size}'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    return load_config(ROOT / f"examples/configs/sead_{size}.yaml", [*paths, *overrides])


def predicted(config: RunConfig, world: int, rates: Rates = RATES, lengths: Lengths = EQUAL) -> Prediction:
    return predict(config, world, shape("7b"), shape("32b"), rates, lengths)


def seconds(prediction: Prediction, phase: str, name: str) -> float:
    return sum(term.seconds for term in prediction.terms if (term.phase, term.name) == (phase, name))


def test_products_of_training_are_six_times_weights_and_tokens() -> None:
    told = predicted(config_of("7b", *ALONE), 8)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of the layers' matrices
    tokens = 96 / 8 * 1024  # of a replica
    assert seconds(told, "training", "products") == pytest.approx(6 * weights * tokens / 600e12)
    teacher = 64 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 27648)
    assert seconds(told, "teacher", "products") == pytest.approx(2 * teacher * tokens / 600e12)
    whole = predicted(config_of("7b", *ALONE[:2], "training.recompute_granularity=full"), 8)
    assert seconds(whole, "training", "products") == pytest.approx(8 * weights * tokens / 600e12)


def test_heads_read_logits_of_both_models_and_teach_half_of_the_tokens() -> None:
    """Zones A, B and C have 50, 40 and 10 % of the tokens; A has no weight."""
    told = predicted(config_of("7b", *ALONE, "training.micro_batch_tokens=18432"), 96)  # one micro-batch: scored there
    scores, loss, gradients = 9216 * 1000, 9216 * 500, 2 * 4096 * 500
    expected = 2 * 100_352 * (scores + loss + gradients) / 600e12
    assert seconds(told, "training", "heads' products") == pytest.approx(expected)


@pytest.mark.parametrize(("stages", "virtual"), [(2, None), (4, None), (4, 2), (8, 4)])
def test_the_bubble_is_stages_less_one_over_micro_batches_and_virtual_stages(stages: int, virtual: int | None) -> None:
    settings = [*ALONE, f"{PP}={stages}", f"{VPP}={'null' if virtual is None else virtual}"]
    config = config_of("7b", *settings, "training.micro_batch_tokens=18432", "training.global_batch_size=960")
    told = predicted(config, stages)
    count = micro_batches(config, 1, EQUAL).count
    work = sum(t.seconds for t in told.terms if t.phase == "teacher" and "stage" not in t.name + t.formula)
    work -= seconds(told, "teacher", "weights to the GPU") + seconds(told, "teacher", "hidden states to the host")
    assert seconds(told, "teacher", "pipeline bubble") / work == pytest.approx((stages - 1) / (count * (virtual or 1)))


def test_gradients_and_weights_go_around_the_ring_of_replicas() -> None:
    told = predicted(config_of("7b", *ALONE, "device=cpu"), 4)  # on a CPU nothing hides them
    parameters = 7_298_011_136 + 2 * (100_352 - 100_278) * 4096
    assert seconds(told, "optimizer", "gradients summed") == pytest.approx(4 * parameters * 3 / 4 / 350e9)
    assert seconds(told, "optimizer", "weights gathered") == pytest.approx(2 * parameters * 3 / 4 / 350e9)
    far = predicted(config_of("7b", *ALONE, "device=cpu"), 16)
    assert seconds(far, "optimizer", "weights gathered") == pytest.approx(2 * parameters * 15 / 16 / 45e9)


def test_on_a_gpu_gradients_are_summed_behind_the_last_backward_pass() -> None:
    assert seconds(predicted(config_of("7b", *ALONE), 4), "optimizer", "gradients summed") == 0
    short = predicted(config_of("7b", *ALONE), 4, lengths=Lengths((10,), 10.0, ""))
    whole = predicted(config_of("7b", *ALONE, "device=cpu"), 4, lengths=Lengths((10,), 10.0, ""))
    summed = [seconds(told, "optimizer", "gradients summed") for told in (short, whole)]
    assert 0 < summed[0] < summed[1]


def test_a_teacher_that_stays_on_the_gpu_does_not_travel() -> None:
    offloaded, resident = (predicted(config_of("7b", f"teacher.offload={v}"), 32) for v in ("true", "false"))
    weights = 2 * shape("32b").rank_parameters(0, config_of("7b").parallel)
    assert seconds(offloaded, "teacher", "weights to the GPU") == pytest.approx(weights / 55e9)
    assert offloaded.seconds - resident.seconds == pytest.approx(weights / 55e9)


def test_context_parallel_ranks_share_the_work_and_send_each_other_keys() -> None:
    alone, shared = (predicted(config_of("7b", *ALONE, f"parallel.context_parallel_size={n}"), 4 * n) for n in (1, 4))
    for phase, name in (("training", "products"), ("training", "attention"), ("scores", "heads' products")):
        assert seconds(shared, phase, name) == pytest.approx(seconds(alone, phase, name) / 4)
    tokens, layers = 24 * 1024, 64  # of a replica; the windows hold a micro-batch's half
    sent = 2 * 2 * layers * tokens * 3 / 4 * 1024
    assert 0.5 * sent / 350e9 < seconds(shared, "teacher", "keys and values") <= sent / 350e9
    assert seconds(alone, "teacher", "keys and values") == 0


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def test_decoding_goes_on_with_those_that_are_left() -> None:
    assert segments((1, 3), 2) == (Segment(1, 2, 0.5), Segment(2, 1, 2.0))
    assert sum(part.steps for part in segments((1, 3), 1)) == 4
    parts = segments((5,) * 6, 2)
    assert {part.live for part in parts} == {2} and sum(part.steps for part in parts) == 15


def test_every_token_is_written_once() -> None:
    lengths = tuple(range(1, 40))
    for at_once in (1, 3, 10, 39, 100):
        assert sum(part.steps * part.live for part in segments(lengths, at_once)) == sum(lengths)


def test_one_long_response_is_the_tail() -> None:
    config = config_of("7b", *ALONE)
    even, uneven = (predicted(config, 8, lengths=Lengths(v, 24.0, "")) for v in ((1000,), (900,) * 95 + (10_500,)))
    assert seconds(even, "rollouts", "tail") == 0
    assert seconds(uneven, "rollouts", "tail") > 5 * seconds(even, "rollouts", "decoding")
    assert uneven.binds[0] == "the tail of rollouts"


def test_a_cache_that_holds_few_rollouts_takes_longer() -> None:
    config, lengths = config_of("7b", *ALONE), Lengths((4000,), 24.0, "")
    shapes = shape("7b"), shape("32b"), RATES, lengths
    rich, poor = (predict(config, 8, *shapes, cache) for cache in (None, 4.0 * 2**30))
    assert poor.rollouts_at_once < 12 <= rich.rollouts_at_once
    assert poor.of_phase("rollouts") > 2 * rich.of_phase("rollouts")


def test_overlap_hides_the_teacher_behind_the_longest_rollouts() -> None:
    lengths = Lengths((*(900,) * 95, 10_500), 24.0, "")
    apart, together = (
        predicted(config_of("7b", f"rollouts.overlap={v}"), 32, lengths=lengths) for v in ("false", "true")
    )
    assert together.of_phase("teacher") == pytest.approx(0, abs=1e-9)
    assert together.seconds == pytest.approx(apart.seconds - apart.of_phase("teacher"))


def test_recorded_rollouts_are_not_written(tmp_path: Path) -> None:
    config = config_of("7b", "rollouts.engine=replay", f"rollouts.path={tmp_path}")
    told = predicted(config, 32)
    assert told.of_phase("rollouts") == told.of_phase("update") == 0 < told.of_phase("teacher")


# --- What must hold ---------------------------------------------------------------------------------------------------

LAYOUTS = [
    (8, ALONE),
    (16, []),
    (32, []),
    (32, [f"{PP}=4", f"{VPP}=2", "teacher.offload=false"]),
    (64, [f"{TP}=2", "parallel.sequence_parallel=false", f"{PP}=2", "rollouts.tensor_parallel_size=4"]),
    (512, [f"{PP}=2", "rollouts.overlap=true"]),
]


@pytest.mark.parametrize("rate", [name for name in Rates.model_fields if name != "pageable_host_link_gb"])
def test_a_better_machine_is_never_slower(rate: str) -> None:
    faster = RATES.model_copy(
        update={rate: getattr(RATES, rate) * (2 if rate.endswith(("gb", "tflops", "node")) else 0.5)}
    )
    gains = []
    for world, overrides in LAYOUTS:
        config = config_of("7b", "checkpoints.interval=" + ("0" if rate == "gpus_per_node" else "20"), *overrides)
        before, after = (predicted(config, world, rates).seconds for rates in (RATES, faster))
        assert after <= before * (1 + 1e-12)
        gains.append(before - after)
    assert max(gains) > 0 or rate == "fp32_tflops"


def test_longer_responses_and_larger_batches_are_never_faster() -> None:
    for world, overrides in LAYOUTS:
        short, long_ = (
            predicted(config_of("7b", *overrides), world, lengths=Lengths((n,), 24.0, "")) for n in (500, 900)
        )
        assert long_.seconds > short.seconds
        small, large = (
            predicted(config_of("7b", f"training.global_batch_size={n}", *overrides), world) for n in (96, 192)
        )
        assert large.seconds > small.seconds


def test_every_term_has_a_formula_a_rate_and_a_phase_and_all_make_the_step() -> None:
    measured = {phase for phases in MEASURED.values() for phase in phases}
    for world, overrides in LAYOUTS:
        told = predicted(config_of("7b", *overrides), world)
        assert all(term.formula and term.binds for term in told.terms)
        assert all(sum(term.parts.values()) == pytest.approx(term.seconds) for term in told.terms)
        assert all(set(term.parts) <= set(Rates.model_fields) for term in told.terms)
        assert told.seconds == pytest.approx(sum(told.of_phase(phase) for phase in PHASES))
    assert measured | {"saves"} == set(PHASES)


def test_rows_are_padded_and_packed_rollouts_are_not() -> None:
    lengths = Lengths(tuple(range(1, 97)), 4.0, "")
    rows = ["training.micro_batch_tokens=null", "training.micro_batch_size=12"]
    padded, packed = (micro_batches(config_of("7b", *ALONE, *extra), 1, lengths) for extra in (rows, []))
    assert (padded.count, packed.count) == (8, 1)
    assert packed.tokens == sum(range(1, 97)) + 4 * 96
    assert padded.tokens * 8 == sum(12 * (longest + 4) for longest in range(12, 97, 12))
    assert packed.span(None) == pytest.approx(sum(n * (n + 1) / 2 for n in range(5, 101)) / packed.tokens)
    assert packed.span(8) < 8 < packed.span(None)
