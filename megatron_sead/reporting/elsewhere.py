"""Where a step's numbers go beside metrics.jsonl, under the same names: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_sead.errors import UserError

log = logging.getLogger(__name__)

WandbMode = Literal["off", "offline", "online"]


class Elsewhere(Protocol):
    """Takes finite numbers by the names of `METRICS`."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under ``tensorboard/``.

    Args:
        first_step: of those that earlier starts wrote, this step and later ones are void.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A W&B run a start, all in one group, under ``wandb/`` and, with mode online, at the service.

    W&B forgets no step and takes none twice: so a run that goes on is another W&B run, and what is plotted against is
    our own `step`, which agrees between them.

    Args:
        settings: of the run, by dotted key.

    Raises:
        UserError: it does not begin, for example without a login.
    """

    def __init__(self, directory: Path, mode: WandbMode, project: str, settings: Mapping[str, Any]) -> None:
        require_wandb(mode)
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                group=directory.resolve().name,
                dir=str(directory),
                mode=mode,
                config=dict(settings),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # W&B's own, and whatever its service answers
            raise UserError(f"reporting.wandb={mode!r}: cannot begin: {' '.join(str(error).split())}") from error
        self._failed = False
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._ask(lambda: self._run.log({"step": step, **numbers}))

    def close(self) -> None:
        self._ask(self._run.finish)

    def _ask(self, call: Callable[[], Any]) -> None:
        """A service that fails must not end a run: metrics.jsonl has everything."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            log.warning("Weights & Biases fails, and gets no more of this start: %s", " ".join(str(error).split()))


def require_wandb(mode: WandbMode) -> None:
    """Raises UserError where W&B is asked for and not installed."""
    if mode != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"reporting.wandb={mode!r}: needs the package wandb; pip install wandb, or set it to off")
