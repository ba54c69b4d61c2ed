"""Steps of TRL's DistillationTrainer, timed; runs in an environment that has TRL, not this package.

``python tools/trl_step.py SETTINGS.json`` prints one JSON object: see `Settings` and `StepTimer`. Started by
``tools/benchmark_step.py``, which also says why each setting is what it is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Settings(TypedDict):
    """What `tools/benchmark_step.py` writes: the same for both trainers."""

    student: str
    teacher: str
    prompts: list[str]  # a step's, all of them
    steps: int
    micro_batch_size: int
    max_new_tokens: int
    lr: float
    seed: int


class StepTimer(TrainerCallback):
    """Wall time from the end of a step to the end of the next, logging and data loading included."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.mean_lengths: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """The trainer calls this once a step, as its last act in it; and once more when training has ended."""
        if logs is not None and "completions/mean_length" in logs:
            self.ends.append(time.perf_counter())
            self.mean_lengths.append(logs["completions/mean_length"])


def main(settings: Settings) -> dict[str, Any]:
    """Train; what was measured."""
    torch.set_num_threads(1)
    timer = StepTimer()
    tokenizer = AutoTokenizer.from_pretrained(settings["student"], padding_side="left", trust_remote_code=False)
    conversations = [[{"role": "user", "content": prompt}] for prompt in settings["prompts"]]
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            model=settings["student"],
            teacher_model=settings["teacher"],
            args=_arguments(settings, output),
            train_dataset=Dataset.from_list([{"prompt": conversation} for conversation in conversations]),
            processing_class=tokenizer,
            callbacks=[timer],
        )
        trainer.train()
    prompt_ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]
    return {
        "step_seconds": [after - before for before, after in zip(timer.ends, timer.ends[1:], strict=False)],
        "response_tokens": [round(mean * len(conversations)) for mean in timer.mean_lengths[1:]],
        "prompt_tokens": sum(map(len, prompt_ids)),
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
        "threads": torch.get_num_threads(),
        "dtype": str(next(trainer.model.parameters()).dtype),
        "attention": trainer.model.config._attn_implementation,
    }


def _arguments(settings: Settings, output: str) -> DistillationConfig:
    return DistillationConfig(
        output_dir=output,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=len(settings["prompts"]) // settings["micro_batch_size"],
        max_completion_length=settings["max_new_tokens"],
        temperature=1.0,
        beta=1.0,  # reverse divergence, over the whole vocabulary
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,  # on by default; off is faster, and ours recomputes nothing either
        save_strategy="no",
        report_to="none",
        logging_steps=1,  # ours writes metrics every step as well, and the token counts come from it
        disable_tqdm=True,
        seed=settings["seed"],
    )


if __name__ == "__main__":
    measured = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(measured))
