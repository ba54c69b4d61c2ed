"""A trained model of another family, on real text: what random weights hide, logits of real size among them.

MEGATRON_SEAD_REAL_MODEL names the folder of SmolLM2-135M-Instruct in Hugging Face format, fp32 (30 layers, 9 heads, 3
key/value heads, the head tied to the embedding). Without it these tests are skipped, and say so.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.checkpoints.test_conversion import bits_differ, convert, export
from tests.distributed.ranks import RankPool, RankPools
from tests.models.parity import Batch, Layout, Measured, megatron_step, merge, reference_step
from tests.training.launching import metrics_of, train_tiny

# Relative to the largest entry of each tensor, fp32. Thirty layers of summation order; a fault gives a hundred times it
TOLERANCE = 1e-4
LENGTHS = (48, 36)  # of two micro-batches of two sequences each
STEPS = 10


@pytest.fixture(scope="module")
def real_model() -> Path:
    folder = os.environ.get("MEGATRON_SEAD_REAL_MODEL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs MEGATRON_SEAD_REAL_MODEL, the folder with SmolLM2-135M-Instruct in Hugging Face format")
    return Path(folder)


@pytest.fixture(scope="module")
def batch(real_model: Path) -> Batch:
    """The beginning of Python's own documentation, each token to be followed by the next."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[:20_000]
    ids = AutoTokenizer.from_pretrained(real_model)(text, add_special_tokens=False).input_ids
    assert json.loads((real_model / "config.json").read_text())["pad_token_id"] not in ids  # has no gradient there
    rows = iter(range(len(LENGTHS) * 2))
    pairs = [[ids[1000 * i : 1000 * i + n + 1] for i in (next(rows), next(rows))] for n in LENGTHS]
    both = [torch.tensor(pair) for pair in pairs]
    return Batch([x[:, :-1] for x in both], [x[:, 1:] for x in both], [torch.ones_like(x[:, 1:]) for x in both])


@pytest.fixture(scope="module")
def reference(real_model: Path, batch: Batch) -> Measured:
    """In fp64: in fp32 torch's own softmax over 49,152 columns costs gradients three digits."""
    return reference_step(real_model, batch, torch.float64)


@pytest.fixture(scope="module")
def pools() -> Iterator[RankPools]:
    started = RankPools(timeout=900.0)
    yield started
    started.stop()


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=3), Layout(tp=3, sp=True), Layout(pp=2)], ids=str)
def test_logits_and_gradients_on_real_text(
    pools: RankPools, real_model: Path, batch: Batch, reference: Measured, layout: Layout
) -> None:
    ranks: RankPool = pools.of(layout.tp * layout.pp)
    worst = merge(ranks.run(megatron_step, real_model, layout, batch)).worst(reference)
    print(f"{layout}: {worst}; losses {reference.losses}")
    assert max(worst.values()) < TOLERANCE
    assert reference.losses[0] / batch.mask[0].sum() < 5  # nats a token: it speaks


def test_every_bit_comes_back(real_model: Path, tmp_path: Path) -> None:
    convert(real_model, tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "back")
    assert (
        bits_differ(load_file(tmp_path / "back/model.safetensors"), load_file(real_model / "model.safetensors")) == []
    )


def damaged(source: Path, directory: Path) -> Path:
    """A copy whose matrices have noise of a tenth of their own size."""
    shutil.copytree(source, directory)
    tensors, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        if "layers" in name and tensors[name].dim() == 2:
            tensors[name] += 0.1 * tensors[name].std() * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_damaged_copy_learns_from_the_whole_one(pools: RankPools, real_model: Path, tmp_path: Path) -> None:
    """Ten steps of the main job: the divergence from the teacher falls."""
    prompts = tmp_path / "prompts.jsonl"
    questions = [f"What is {a} + {b}?" for a in range(2, 6) for b in range(3, 7)]
    rows = [{"id": str(i), "prompt": text, "answer": str(i)} for i, text in enumerate(questions)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"student.path={damaged(real_model, tmp_path / 'student')}",
        f"teacher.path={real_model}",
        f"prompts.path={prompts}",
        f"training.steps={STEPS}",
        "training.global_batch_size=8",
        "training.micro_batch_size=4",
        "training.lr=2e-5",
        "training.min_lr=2e-5",
        "rollouts.max_new_tokens=16",
        "curriculum.mode=none",
    ]
    train_tiny(pools, 1, tmp_path / "run", overrides)
    divergence = [line["forward_kl"] for line in metrics_of(tmp_path / "run")]
    print(divergence)
    assert len(divergence) == STEPS and all(map(math.isfinite, divergence))
    assert sum(divergence[-3:]) < 0.85 * sum(divergence[:3])
