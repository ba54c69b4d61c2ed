"""OLMo-3 at the widths of the 7B, or small on a CPU: configurations, models and batches for the checks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.gpu.check import CUDA, DEVICE

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "examples" / "shapes" / "olmo3-7b" / "config.json"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "eos_token_id": 498,
    "pad_token_id": 499,
    "sliding_window": 24,
}


def write_shape(layers: int) -> Path:
    """A directory with the config.json of a 7B of so many layers, without weights."""
    config = json.loads(SHAPE.read_text(encoding="utf-8")) | ({} if CUDA else SMALL)
    kinds = config["layer_types"][:layers]
    if layers < 4:  # the pattern has its full layer fourth
        kinds[-1] = "full_attention"
    config |= {"num_hidden_layers": layers, "layer_types": kinds}
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def start_parallel() -> Any:
    """Process groups of one rank, as a run makes them; on a CPU Megatron is adapted first."""
    if not CUDA:
        from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

        adapt_to_cpu()
    from megatron_sead.config.parallel import ParallelSettings
    from megatron_sead.parallel.groups import initialize_parallel

    return initialize_parallel(ParallelSettings(), DEVICE.type, seed=0)


def random_model(folder: Path, parallel: Any, **options: Any) -> Any:
    """Our model in bf16 on the device, with random weights made there: norms from 0.5 to 1.5, the rest as trained."""
    from megatron_sead.models.builder import build_model

    (model,) = build_model(folder, parallel, precision="bf16", load_weights=False, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.02)
    return model


def micro_batches(count: int, prompt: int, response: int, vocabulary_size: int, seed: int = 1) -> list[Any]:
    """`count` micro-batches of one rollout, of random tokens."""
    from megatron_sead.prompts.packing import pack

    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[tuple[int, ...]]:
        tokens = torch.randint(0, vocabulary_size - 2, (count, length), generator=generator)
        return [tuple(row) for row in tokens.tolist()]

    asked = draw(prompt)
    return pack(
        asked,
        asked,
        draw(response),
        [True] * count,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        length_multiple=1,
        pad_token_id=vocabulary_size - 1,
        device=DEVICE,
    )
