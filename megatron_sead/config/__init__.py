"""Every setting of a run, and what is told of a wrong one. No torch here."""

from megatron_sead.config.run import RunConfig, load_config

__all__ = ["RunConfig", "load_config"]
