"""What SEAD is: statistics of tokens, the loss, zones, annealing, policies, curriculum. Imports torch alone.

The names are those of `exports`. They are imported when one is first asked for: settings read the names, defaults and
rules of policies, zones, annealing and curriculum in the modules here that need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sead.distillation.exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    exports = import_module(f"{__name__}.exports")  # brings the modules, too
    if name in ("__all__", *exports.__all__):
        return getattr(exports, name)
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
