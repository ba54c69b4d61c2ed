"""A run whose settings change how it speaks exports a model that speaks so, at its end and from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from megatron_sead.config.run import load_config
from megatron_sead.prompts.dataset import stream_prompts
from megatron_sead.prompts.tokenizer import load_tokenizer
from tests.distributed.programs import run_program
from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, train_tiny

TINY = ROOT / "examples" / "tiny"


@pytest.fixture(scope="module")
def run(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one step; tokenizer, chat template, system prompt and stop tokens are not the student's own."""
    folder = tmp_path_factory.mktemp("speech")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "student" / name, tokenizer)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|im_start|>"}))
    template = folder / "own.jinja"
    template.write_text("{{ bos_token }}" + (TINY / "student" / "chat_template.jinja").read_text())
    spoken = {"tokenizer": tokenizer, "chat_template": template, "system_prompt": "Count well.", "stop_token_ids": [2]}
    changes = [f"student.{name}={value}" for name, value in spoken.items()]
    changes += ["training.steps=1", "training.lr_warmup_steps=0", "training.global_batch_size=8", "seed=0"]
    changes += ["training.micro_batch_size=8", "rollouts.max_new_tokens=8"]
    train_tiny(pools, 1, folder / "run", changes)
    return folder / "run"


@pytest.fixture(scope="module")
def converted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "student"
    tool = ROOT / "tools" / "convert_checkpoint.py"
    done = run_program(tool, "megatron-to-hf", "--input", str(run), "--output", str(output))
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("tokenizer: that of", "chat template: that of student.chat_template=", "eos_token_id: [2] of"):
        assert f"\n{line}" in f"\n{done.stdout}"
    return output


@pytest.mark.parametrize("exported", ["run", "converted"])
def test_transformers_writes_the_prompts_of_the_run(exported: str, run: Path, request: pytest.FixtureRequest) -> None:
    directory = run / "student-hf" if exported == "run" else request.getfixturevalue("converted")
    config = load_config(run / "config.yaml", [])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(config.student, "student")
    for prompt in stream_prompts(config.prompts, ours, limit=5):
        messages = [{"role": "user", "content": prompt.text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tuple(ids) == prompt.student_token_ids
    assert "Count well." in tokenizer.decode(ids) and tokenizer.decode(ids[:2]) == "<|im_start|><|im_start|>"
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [2]
