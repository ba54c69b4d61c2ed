"""Every family is transformers' model under every layout, and every bit comes back from Megatron's format.

Tolerance: as in test_parity.py, of which the faults that only OLMo-3 can have are left there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.planning.shapes import read_shape
from tests.checkpoints.test_conversion import bits_differ, convert, convert_on_one_rank, export, wrong_weights
from tests.checkpoints.test_resume import last_stage
from tests.checkpoints.training import train
from tests.distributed.ranks import RankPool, RankPools
from tests.models.families import FAMILIES, LENGTHS, make_model
from tests.models.parity import Layout, Measured, make_batch, megatron_step, merge, reference_step, relative
from tests.models.test_huggingface import round_trip

TOLERANCE = 1e-5
LAYOUTS = [
    Layout(),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, sp=True, recompute="full"),
]
TIED = [name for name in FAMILIES if name.endswith("-tied")]


@pytest.fixture(scope="session")
def three_ranks(pools: RankPools) -> RankPool:
    return pools.of(3)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measured]:
    """A model, and one step of it by transformers."""
    directory = make_model(request.param, tmp_path_factory.mktemp(request.param) / "hf")
    return directory, reference_step(directory, make_batch(300, LENGTHS))


def distance(ranks: RankPool, family: tuple[Path, Measured], layout: Layout, **changes: Any) -> dict[str, float]:
    directory, reference = family
    return merge(ranks.run(megatron_step, directory, layout, make_batch(300, LENGTHS), **changes)).worst(reference)


@pytest.mark.mcore_lane
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_family_is_transformers(ranks: RankPool, family: tuple[Path, Measured], layout: Layout) -> None:
    worst = distance(ranks, family, layout)
    print(f"{layout}: {worst}")
    assert max(worst.values()) < TOLERANCE


@pytest.mark.parametrize("layout", [Layout(tp=3), Layout(tp=3, sp=True), Layout(pp=1)], ids=str)
def test_an_odd_number_of_ranks(three_ranks: RankPool, family: tuple[Path, Measured], layout: Layout) -> None:
    assert max(distance(three_ranks, family, layout).values()) < TOLERANCE


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, vpp=2), Layout(tp=2, pp=2)], ids=str)
def test_weights_come_back_bit_for_bit(ranks: RankPool, family: tuple[Path, Measured], layout: Layout) -> None:
    assert ranks.run(round_trip, family[0], layout) == [[]] * 4


def test_conversion_comes_back_bit_for_bit(family: tuple[Path, Measured], tmp_path: Path) -> None:
    """Weights; and the configuration, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    source = family[0]
    done = convert(source, tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    expected = load_file(source / "model.safetensors")
    assert bits_differ(load_file(tmp_path / "back/model.safetensors"), expected) == []
    assert done.parameters == sum(tensor.numel() for tensor in expected.values())
    ids = torch.arange(4, 44)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(d) for d in (source, tmp_path / "back"))
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert before.config.rope_parameters == after.config.rope_parameters


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_megatron_loads_what_was_converted(
    ranks: RankPool, family: tuple[Path, Measured], tmp_path: Path, layout: Layout
) -> None:
    ranks.run(convert_on_one_rank, family[0], tmp_path / "megatron")
    assert ranks.run(wrong_weights, tmp_path / "megatron", family[0], layout) == [[]] * 4


def test_layer_by_layer_it_is_the_same_model(ranks: RankPool, family: tuple[Path, Measured], tmp_path: Path) -> None:
    ranks.run(convert_on_one_rank, family[0], tmp_path / "megatron")
    assert max(ranks.run(largest_difference, family[0], tmp_path / "megatron")) < 1e-4


def largest_difference(hf_dir: Path, checkpoint: Path) -> float:
    """Of log-probabilities, by what ``verify`` compares on a text."""
    from megatron_sead.checkpoints.layerwise import compare_on_text
    from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(ParallelSettings(), "cpu", seed=0)
    with HuggingFaceModel(hf_dir) as hf, MegatronModel(checkpoint) as megatron:
        found = compare_on_text(hf, megatron, torch.arange(4, 68), parallel)
    destroy_parallel(keep_world=True)
    assert found.same
    return found.largest


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_a_plan_counts_what_ranks_hold(family: tuple[Path, Measured], tp: int, pp: int) -> None:
    """Every tensor once; norms on every rank; padding; and a tied head once more where it has a stage of its own."""
    shape = read_shape(ModelSettings(path=family[0]), "student")
    expected = load_file(family[0] / "model.safetensors")
    assert shape.parameters == sum(tensor.numel() for tensor in expected.values())
    parallel = ParallelSettings(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    held = tp * sum(shape.rank_parameters(stage, parallel) for stage in range(pp))
    full_width = json.loads((family[0] / "config.json").read_text())["model_type"].startswith("olmo")
    replicated = [n for n in expected if "norm" in n and not (full_width and ("q_norm" in n or "k_norm" in n))]
    tables = 1 if "lm_head.weight" not in expected and pp == 1 else 2
    held_tables = tables * 384 * 96
    rest = sum(expected[n].numel() for n in expected if "embed" not in n and "lm_head" not in n)
    assert held == held_tables + rest + (tp - 1) * sum(expected[n].numel() for n in replicated)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("olmo")])
def test_a_run_continues_under_another_layout(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Saved with tied weights on two stages, with Adam's moments spread over ranks; continued on one, and back."""
    directory = make_model(name, tmp_path / "hf")
    whole = ranks.run(train, directory, Layout(pp=2), tmp_path / "run", steps=4, save_after=(2,))
    for layout in (Layout(pp=2), Layout(tp=2), Layout(pp=2, vpp=2)):
        resumed = ranks.run(train, directory, layout, tmp_path / "run", steps=4, resume=True)
        assert last_stage(resumed) == pytest.approx(last_stage(whole)[2:], rel=TOLERANCE)
        for found, expected in zip(resumed[0].weights, whole[0].weights[2:], strict=True):
            assert max(relative(found[n], expected[n]) for n in expected) < TOLERANCE


# --- What a mistake would look like ----------------------------------------------------------------------------------


def head_norms_not_summed(chunks: list[Any]) -> None:
    chunks[0].config.qk_layernorm = False


def copies_not_summed(chunks: list[Any]) -> None:
    for chunk in chunks:
        chunk.share_embeddings_and_output_weights = False


def no_scaling(chunks: list[Any]) -> None:
    from megatron_sead.models.rotary import plain_frequencies

    for chunk in chunks:
        chunk.rotary_pos_emb.frequencies = plain_frequencies(8, 1e4)


@pytest.mark.parametrize(
    ("name", "fault", "layout"),
    [
        ("qwen3", head_norms_not_summed, Layout(tp=2)),
        ("llama-tied", copies_not_summed, Layout(pp=2)),
        ("llama", no_scaling, Layout()),
    ],
)
def test_a_fault_is_seen(ranks: RankPool, tmp_path: Path, name: str, fault: Any, layout: Layout) -> None:
    directory, batch = make_model(name, tmp_path), make_batch(300, LENGTHS)
    reference = reference_step(directory, batch)
    worst = merge(ranks.run(megatron_step, directory, layout, batch, fault=fault)).worst(reference)
    assert not worst["gradients"] < 10 * TOLERANCE


# --- A head that is the embedding, and in the files once more --------------------------------------------------------


def with_head(directory: Path, change: float) -> Path:
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("name", TIED)
def test_a_repeated_head_is_the_embedding(ranks: RankPool, tmp_path: Path, name: str) -> None:
    directory = make_model(name, tmp_path / "hf")
    expected = load_file(directory / "model.safetensors")
    done = convert(with_head(directory, 0.0), tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    assert done.ignored == ["lm_head.weight"]
    assert bits_differ(load_file(tmp_path / "back/model.safetensors"), expected) == []
    batch = make_batch(300, LENGTHS)
    worst = merge(ranks.run(megatron_step, directory, Layout(pp=2), batch)).worst(reference_step(directory, batch))
    assert max(worst.values()) < TOLERANCE


def test_another_head_than_the_embedding_is_refused(tmp_path: Path) -> None:
    directory = with_head(make_model("llama-tied", tmp_path / "hf"), 1e-3)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight, .*tie_word_embeddin"):
        convert(directory, tmp_path / "megatron")


def test_a_head_that_is_not_tied_must_be_there(tmp_path: Path) -> None:
    directory = make_model("llama-tied", tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"tensors are missing: lm_head.weight"):
        convert(directory, tmp_path / "megatron")
