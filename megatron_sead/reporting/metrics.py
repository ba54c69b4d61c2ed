"""One object a step in metrics.jsonl, and the same numbers in TensorBoard."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sead.files.durable import replace_text


class MetricsWriter:
    """Appends to ``metrics.jsonl``. Only one rank may hold one.

    Args:
        directory: run directory.
        first_step: the step that comes next; lines of this step and later, left by steps that an interruption made
            void, are dropped, because they will be computed again.
        tensorboard: also write event files under ``tensorboard/``.
    """

    def __init__(self, directory: Path, first_step: int, tensorboard: bool) -> None:
        self._path = directory / "metrics.jsonl"
        self._drop_from(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def _drop_from(self, first_step: int) -> None:
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, LookupError, TypeError, RecursionError):  # a line cut short by a crash
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
        replace_text(self._path, "".join(line + "\n" for line in kept))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step. Values that are not finite become null, so that every line is valid JSON."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and key != "step":
                    self._events.add_scalar(key, value, clean["step"])

    def close(self) -> None:
        """Flush everything to disk."""
        self._file.close()
        if self._events is not None:
            self._events.close()
