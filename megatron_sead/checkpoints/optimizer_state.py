"""Megatron-Core's optimizers with torch's AdamW, through a checkpoint and back: four faults, mended here.

Megatron-Core uses the fused Adam of Transformer Engine or Apex where one is installed, which keeps its step count in
the parameter group. torch's AdamW keeps a tensor ``step`` beside each parameter's moments, and both released
Megatron-Cores (0.16.1, 0.19.2) stumble over it:

1. A new AdamW has no state. ``sharded_state_dict(is_loading=True)`` reads the step out of it and asserts. So does
   saving before the first update.
2. Format ``fully_reshardable`` holds no ``step`` beside the moments, and loading asks for one: KeyError.
3. In fp32 the main parameters are views of leaves that require gradients: copying into them with gradients enabled
   raises. Seen with format ``dp_reshardable``; `fully_reshardable` comes by the same line.
4. Silent: ``load_state_dict`` puts ONE step tensor into every parameter's state. The next update advances it once a
   parameter, and Adam's bias correction is that of thousands of steps. (Format ``dp_reshardable``, which is not used
   here, sets the steps back to 0 as silently.)

Everything here asks for the key ``step``, not for a version, and leaves the fused Adams alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def give_every_parameter_a_state(optimizer: Any) -> None:
    """AdamW's state before its first update: step and both moments zero (fault 1). Existing state stays."""
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter.detach()),
                        "exp_avg_sq": torch.zeros_like(parameter.detach()),
                    }


@contextmanager
def loading_into(optimizer: Any) -> Iterator[None]:
    """Around ``sharded_state_dict(is_loading=True)`` and ``load_state_dict``: all four remedies."""
    give_every_parameter_a_state(optimizer)
    with ExitStack() as stack:
        for part in _parts(optimizer):
            if _is_torch_adam(part.optimizer) and hasattr(part, "_set_main_param_and_optimizer_states"):
                stack.enter_context(_steps_left_alone(part))
        yield
    give_every_parameter_its_own_step(optimizer)


def give_every_parameter_its_own_step(optimizer: Any) -> None:
    """Undo the sharing of one step tensor (fault 4)."""
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
            else:  # a checkpoint from before the first update: step 0 is not written by every Megatron optimizer
                state["step"] = torch.zeros((), dtype=torch.float32)


@contextmanager
def _steps_left_alone(distributed: Any) -> Iterator[None]:
    """Let Megatron's DistributedOptimizer copy moments and main parameters under no_grad (fault 3), and keep the step
    (fault 2).

    ``load_state_dict`` has set the step from the parameter groups, so each parameter is handed its own value back.
    """
    copy_all = distributed._set_main_param_and_optimizer_states

    @torch.no_grad()
    def copy_all_but_step(model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, place = distributed.model_param_group_index_map[model_parameter]
        main = distributed.optimizer.param_groups[group]["params"][place]
        copy_all(model_parameter, tensors | {"step": distributed.optimizer.state[main]["step"]})

    distributed._set_main_param_and_optimizer_states = copy_all_but_step
    try:
        yield
    finally:
        del distributed._set_main_param_and_optimizer_states  # the class's own again


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers in a ChainedOptimizer, or the one alone; without those of ranks that train nothing."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _is_torch_adam(inner: Any) -> bool:
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _torch_adams(optimizer: Any) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer) if _is_torch_adam(part.optimizer)]
