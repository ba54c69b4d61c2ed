"""A whole run with models of other families: a Qwen3 teaches a Llama, both with the embedding as their head.

What the layouts of `test_layouts` do to OLMo-3 is not repeated: one run on one rank, and the same on four with every
kind of parallelism, whose tied tables are on two pipeline stages.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import make_tokenizer
from tests.distributed.ranks import RankPools
from tests.models.families import FAMILIES, SIZES
from tests.training.launching import metrics_of, train_tiny

STEPS = 3
BOUND = 1e-4  # Adam's first steps divide by the square root of gradients that are nearly zero
FOUR_RANKS = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]


def make_speaker(name: str, directory: Path) -> str:
    """A model of the table with a tokenizer, and numbers for it."""
    tokenizer = make_tokenizer()
    prefix, changes = FAMILIES[name]
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | changes | ids))
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_one_family_teaches_another_under_any_layout(pools: RankPools, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "{i}", "prompt": "{i}+{i}=", "answer": "{2 * i}"}}\n' for i in range(8)))
    overrides = [
        f"student.path={make_speaker('llama-tied', tmp_path / 'llama')}",
        f"teacher.path={make_speaker('qwen3-tied', tmp_path / 'qwen3')}",
        f"prompts.path={prompts}",
        f"training.steps={STEPS}",
        "training.global_batch_size=8",
        "training.micro_batch_size=4",
        "rollouts.max_new_tokens=12",
        "curriculum.mode=none",
    ]
    assert train_tiny(pools, 1, tmp_path / "one", overrides) == [True]
    assert train_tiny(pools, 4, tmp_path / "four", [*overrides, *FOUR_RANKS]) == [True] * 4
    lines = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "four")
    for theirs, ours in zip(*lines, strict=True):
        for key in ("loss", "grad_norm", "forward_kl", "reverse_kl"):
            assert ours[key] == pytest.approx(theirs[key], rel=BOUND), key
    assert lines[0][-1]["forward_kl"] < lines[0][0]["forward_kl"]
    for run in ("one", "four"):
        exported = load_file(tmp_path / run / "student-hf" / "model.safetensors")
        assert exported.keys() == load_file(tmp_path / "llama" / "model.safetensors").keys()
