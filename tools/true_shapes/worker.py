"""One process of a check: ``python worker.py SETTINGS.json RANK``. Writes what it saw beside the settings."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(path: Path, rank: int) -> None:
    from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

    warnings.filterwarnings("ignore")
    adapt_to_cpu()
    import torch

    from megatron_sead.config.parallel import ParallelSettings
    from megatron_sead.models.builder import DTYPES
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from true_shapes.model import Shape, write_model
    from true_shapes.passes import megatron_pass, transformers_pass

    settings = json.loads(path.read_text())
    torch.set_num_threads(settings["threads"])
    folder, shape = Path(settings["folder"]), Shape(**settings["shape"])
    model, reference = folder / "model", folder / "reference"
    if settings["kind"] == "reference":
        write_model(model, shape)
        seen = transformers_pass(model, shape, torch.float32, reference, write=True)
    elif settings["kind"] == "transformers":
        seen = transformers_pass(model, shape, DTYPES[settings["dtype"]], reference, write=False)
    else:
        store = f"file://{path.with_suffix('.store')}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=settings["processes"])
        layout = ParallelSettings(tensor_model_parallel_size=settings["processes"])
        seen = megatron_pass(model, shape, settings["dtype"], reference, initialize_parallel(layout, "cpu", seed=0))
        destroy_parallel()
    path.with_suffix(f".{rank}").write_text(json.dumps(seen.to_json()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
