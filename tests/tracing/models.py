"""Configurations of models whose config.json alone is there, and runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sead.config.run import RunConfig, load_config

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "examples" / "shapes" / "olmo3-7b" / "config.json"
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "eos_token_id": 498,
    "pad_token_id": 499,
    "sliding_window": 24,
}


def write_shape(folder: Path, layers: int = 4, **changes: Any) -> Path:
    """A directory with the config.json of a small OLMo-3: three layers with a window, one without, and so on."""
    config = json.loads(SHAPE.read_text(encoding="utf-8")) | SMALL | changes
    config |= {"num_hidden_layers": layers, "layer_types": (config["layer_types"] * layers)[:layers]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run_of(folder: Path, *overrides: str, layers: int = 4, **changes: Any) -> RunConfig:
    """The 7B run's settings with a small pair, on one rank."""
    student = write_shape(folder / f"student-{layers}", layers, **changes)
    teacher = write_shape(folder / f"teacher-{layers}", layers, **(changes | {"hidden_size": 96}))
    settings = [f"student.path={student}", f"teacher.path={teacher}", "parallel.tensor_model_parallel_size=1"]
    settings += ["parallel.sequence_parallel=false", "training.scratch_bytes=1048576"]
    settings += ["training.micro_batch_tokens=null"]
    return load_config(ROOT / "examples" / "configs" / "sead_7b.yaml", [*settings, *overrides])
