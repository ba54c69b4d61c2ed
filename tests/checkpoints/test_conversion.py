"""Conversion is exact: every bit comes back, and Megatron's own loader, under any layout, gets the same model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Olmo2Config, Olmo2ForCausalLM

from tests.checkpoints.training import train
from tests.conftest import make_olmo3, make_tokenizer
from tests.distributed.ranks import RankPool, RankPools
from tests.models.parity import Layout

LAYERS = ["sliding_attention", "full_attention"] * 2
FORMAT = {"format": "pt"}


@pytest.fixture(scope="session")
def four_ranks(pools: RankPools) -> RankPool:
    return pools.of(4)


@pytest.fixture(scope="module", params=[(4, "float32"), (2, "bfloat16")], ids=["all-kv-heads-fp32", "grouped-bf16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; four layers, a vocabulary that is padded, files cut in odd places, a buffer nobody needs."""
    kv_heads, dtype = request.param
    directory = make_olmo3(
        tmp_path_factory.mktemp("model") / "hf",
        num_hidden_layers=4,
        layer_types=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights_of(directory).items()}
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if "norm" in name:  # ones would hide a norm in another's place
            tensors[name].copy_(torch.rand(tensors[name].shape, generator=generator) + 0.5)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    cut_into_files(directory, tensors)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return directory


def cut_into_files(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Three files; a layer's projections lie in several of them."""
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file, FORMAT)
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """All but the buffers."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}


def bits_differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names, of those that are in one alone too."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found
        or name not in expected
        or (found[name].dtype, found[name].shape) != (expected[name].dtype, expected[name].shape)
        or not torch.equal(found[name].flatten().view(torch.uint8), expected[name].flatten().view(torch.uint8))
    )


def convert(model: Path, output: Path, **options: Any) -> Any:
    from megatron_sead.checkpoints.conversion import huggingface_to_megatron

    return huggingface_to_megatron(model, output, **options)


def export(checkpoint: Path, output: Path, **options: Any) -> Any:
    from megatron_sead.checkpoints.conversion import megatron_to_huggingface
    from megatron_sead.checkpoints.finding import find_checkpoint

    iteration = options.pop("iteration", None)
    return megatron_to_huggingface(find_checkpoint(checkpoint, iteration), output, **options)


@pytest.mark.parametrize("piece_bytes", [2**24, 2000])
def test_every_bit_comes_back(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    from megatron_sead.checkpoints import conversion, torch_dist_writer

    monkeypatch.setattr(conversion, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 50_000)
    steps: list[tuple[int, int]] = []
    done = convert(model, tmp_path / "megatron", advance=lambda *step: steps.append(step))
    export(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=30_001)

    expected = weights_of(model)
    assert bits_differ(weights_of(tmp_path / "back"), expected) == []
    assert done.parameters == sum(tensor.numel() for tensor in expected.values())
    assert done.ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq"] and done.all_zero == []
    assert steps[-1] == (done.bytes, done.bytes) and steps == sorted(steps)
    assert not list(tmp_path.glob(".*"))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
        assert (tmp_path / "megatron" / name).read_bytes() == (model / name).read_bytes()


def test_transformers_gets_the_same_model_back(model: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    convert(model, tmp_path / "megatron")
    export(tmp_path / "megatron", back)
    ids = torch.arange(4, 44)[None]  # beyond the window and YaRN's original length
    before, after = (AutoModelForCausalLM.from_pretrained(d, dtype="auto") for d in (model, back))
    assert before.dtype == after.dtype and torch.equal(before(ids).logits, after(ids).logits)
    assert AutoConfig.from_pretrained(back).rope_parameters == before.config.rope_parameters
    assert AutoTokenizer.from_pretrained(back).chat_template == make_tokenizer().chat_template
    classes = [json.loads((d / "tokenizer_config.json").read_text())["tokenizer_class"] for d in (model, back)]
    assert classes == ["TokenizersBackend", "PreTrainedTokenizerFast"]  # 4.57 does not know the first


@pytest.mark.parametrize("content", ["[]", "{not JSON"])
def test_tokenizer_settings_of_another_form_stay_as_they_are(model: Path, tmp_path: Path, content: str) -> None:
    source = Path(shutil.copytree(model, tmp_path / "hf"))
    (source / "tokenizer_config.json").write_text(content)
    convert(source, tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == content


READ_BY_ANOTHER = """
import sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, results = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
tokens = AutoTokenizer.from_pretrained(directory)("a chat", add_special_tokens=False).input_ids
logits = model(torch.arange(4, 44)[None]).logits
torch.save({"version": transformers.__version__, "tokens": tokens, "logits": logits.detach()}, results)
"""


def test_an_older_transformers_reads_the_same_model(model: Path, tmp_path: Path) -> None:
    """Two releases order a few operations differently, hence the tolerance; a lost YaRN or window moves logits by
    hundredths, and is seen in bf16 too."""
    python = os.environ.get("MEGATRON_SEAD_TRANSFORMERS_4_PYTHON")
    if python is None:
        pytest.skip("needs an interpreter with transformers==4.57.*, named by MEGATRON_SEAD_TRANSFORMERS_4_PYTHON")
    convert(model, tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    subprocess.run([python, "-c", READ_BY_ANOTHER, tmp_path / "back", tmp_path / "results.pt"], check=True)
    found = torch.load(tmp_path / "results.pt")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    expected = here(torch.arange(4, 44)[None]).logits
    assert found["version"].startswith("4.57.") and found["logits"].dtype == expected.dtype
    error = (found["logits"].double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-5 if expected.dtype == torch.float32 else 1e-2)
    assert found["tokens"] == make_tokenizer()("a chat", add_special_tokens=False).input_ids


def test_another_dtype_rounds_once(model: Path, tmp_path: Path) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        done = convert(model, tmp_path / name, dtype=dtype)
        export(tmp_path / name, tmp_path / f"{name}-back")
        expected = {n: tensor.to(dtype) for n, tensor in weights_of(model).items()}
        assert done.dtype == name and bits_differ(weights_of(tmp_path / f"{name}-back"), expected) == []
        assert json.loads((tmp_path / f"{name}-back/config.json").read_text())["dtype"] == str(dtype)[6:]


@pytest.mark.parametrize("stored", [torch.float16, torch.float64], ids=str)
def test_weights_that_are_stored_in_another_floating_type_are_the_same_numbers(
    model: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    hf = Path(shutil.copytree(model, tmp_path / "hf"))
    tensors = {name: tensor.to(stored) for name, tensor in weights_of(model).items()}
    cut_into_files(hf, tensors)
    assert convert(hf, tmp_path / "megatron", dtype=torch.float32).dtype == "fp32"
    export(tmp_path / "megatron", tmp_path / "back")
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    assert bits_differ(weights_of(tmp_path / "back"), expected) == []


def wrong_weights(checkpoint: Path, hf_dir: Path, layout: Layout) -> list[str]:
    """What Megatron's own loader makes of the checkpoint, into a model of other random weights: what differs."""
    from megatron.core import dist_checkpointing

    from megatron_sead.models.builder import build_model
    from megatron_sead.models.huggingface import iterate_huggingface_weights
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    expected = weights_of(hf_dir)
    precision = "bf16" if expected["model.norm.weight"].dtype == torch.bfloat16 else "fp32"
    parallel = initialize_parallel(layout.settings(), "cpu", seed=5)
    chunks = build_model(hf_dir, parallel, precision=precision, sequence_parallel=layout.sp, load_weights=False)
    metadata = {"dp_cp_group": parallel.dp_with_cp}
    state = {f"model{i}": chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(state, str(checkpoint))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    wrong = bits_differ(dict(iterate_huggingface_weights(chunks, parallel)), expected)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                rows = torch.arange(len(parameter)) + parallel.tp_rank * len(parameter)
                if parameter[rows >= chunk.config.vocab_size].count_nonzero():
                    wrong.append(f"padding of {name}")
    destroy_parallel(keep_world=True)
    return wrong


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, sp=True),
        Layout(pp=2),
        Layout(pp=2, vpp=2),
        pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.mcore_lane),
    ],
    ids=str,
)
def test_megatron_loads_it_under_any_layout(model: Path, tmp_path: Path, four_ranks: RankPool, layout: Layout) -> None:
    four_ranks.run(convert_on_one_rank, model, tmp_path / "megatron")
    assert four_ranks.run(wrong_weights, tmp_path / "megatron", model, layout) == [[]] * 4


def convert_on_one_rank(model: Path, output: Path) -> None:
    """In a rank: there Megatron-Core is adapted to the CPU, as the command adapts it."""
    if torch.distributed.get_rank() == 0:
        from megatron_sead.checkpoints import conversion

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conversion, "PIECE_BYTES", 5000)
            convert(model, output)
    torch.distributed.barrier()


@pytest.mark.mcore_lane
@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=4)], ids=str)
def test_a_run_is_exported_whatever_its_layout(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, four_ranks: RankPool, layout: Layout
) -> None:
    student = make_olmo3(
        tmp_path / "student",
        num_hidden_layers=4,
        layer_types=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"student:\n  path: {student}\n")
    trained = four_ranks.run(
        train, student, layout, run / "checkpoints", precision="bf16", steps=3, save_after=(1, 2, 3), keep=3
    )[0]
    exported = four_ranks.run(export_on_one_rank, run)[0]
    for iteration, weights in exported.items():
        assert bits_differ(weights, trained.weights[(iteration or 3) - 1]) == []


def export_on_one_rank(run: Path) -> dict[int | None, dict[str, torch.Tensor]]:
    """The latest step and an older one, by all the names of a run."""
    exported: dict[int | None, dict[str, torch.Tensor]] = {}
    if torch.distributed.get_rank() == 0:
        export(run, run / "latest")
        export(run / "checkpoints", run / "first", iteration=1)
        export(run / "checkpoints" / "step-00000002", run / "second")
        exported = {None: weights_of(run / "latest"), 1: weights_of(run / "first"), 2: weights_of(run / "second")}
    torch.distributed.barrier()
    return exported


def test_a_damaged_latest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from megatron_sead.checkpoints.finding import find_checkpoint
    from megatron_sead.checkpoints.manifest import Manifest, write_manifest

    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")
        write_manifest(folder, Manifest(step, "0.16.1", {}, {"metadata.json": (2, 0)}))
    (tmp_path / "checkpoints/step-00000003/metadata.json").write_text("")
    (tmp_path / "checkpoints/step-00000002/manifest.json").unlink()
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_olmo2_is_the_same_family(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Olmo2Config(**sizes, vocab_size=70, num_key_value_heads=1, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    Olmo2ForCausalLM(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    ids = torch.arange(4, 44)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / d) for d in ("hf", "back"))
    assert type(after).__name__ == "Olmo2ForCausalLM" and torch.equal(before(ids).logits, after(ids).logits)


def test_a_flat_configuration_keeps_yarn(model: Path, tmp_path: Path) -> None:
    """transformers 5.23 reads the flat form as no YaRN; what comes back has it on full layers alone."""
    shutil.copytree(model, tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    expected = config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_parameters": expected["full_attention"]}))
    convert(tmp_path / "hf", tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["rope_parameters"] == expected
