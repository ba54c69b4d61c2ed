"""The script for several GPUs, here over gloo with small sizes: it must never be the script that fails."""

from __future__ import annotations

from pathlib import Path

from tests.gpu.layouts import LAYOUTS
from tests.gpu.several import CHECKS
from tests.gpu.test_acceptance import results_of
from tests.tracing.cases import MATRIX


def test_a_layout_is_compared_with_one_device_and_a_failing_rank_ends_all(tmp_path: Path) -> None:
    (error, layout), _ = results_of("several.sh", tmp_path, "vpp2", "error")
    assert (error["check"], layout["check"]) == ("error", "vpp2")
    assert error["numbers"]["told"] == ["error: forced on the last rank"]
    assert set(layout["expected"]) == {"loss", "grad_norm", "weights"}


def test_the_fake_lane_has_every_layout_of_the_script() -> None:
    """There each runs on fake CUDA tensors, rank by rank."""
    traced = [(ranks, {x for x in settings if x.startswith("parallel.")}) for ranks, _, settings in MATRIX.values()]
    for layout, (ranks, settings) in LAYOUTS.items():
        assert any(s == set(settings) and r in (ranks, 2 * ranks) for r, s in traced), layout


def test_every_check_is_there() -> None:
    from tests.gpu import layouts

    assert all(check.module == "layouts" and callable(getattr(layouts, check.name)) for check in CHECKS)
    assert len({check.number for check in CHECKS}) == len(CHECKS)
