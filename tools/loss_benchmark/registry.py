"""All losses that can be measured, in the order of the tables. A loss is known by its index here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from loss_benchmark.cases import Loss
from loss_benchmark.losses import OWN
from loss_benchmark.peers import PEERS


def all_losses(also: list[Path]) -> list[Loss]:
    """Ours, torch's, the peers', and those in the list LOSSES of each of the user's files."""
    losses = [*OWN, *PEERS]
    for path in also:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        losses += module.LOSSES
    return losses
