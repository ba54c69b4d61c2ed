"""A model's shape that remembers what is on a stage: a search asks thousands of times."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.models.weights import PlacedWeight, named_weights
from megatron_sead.planning.shapes import ModelShape, read_shape

PLACES_NOTHING = ("tensor_model_parallel_size", "context_parallel_size", "sequence_parallel", "timeout_minutes")


class RememberedShape(ModelShape):
    """As `ModelShape`, each question answered once."""

    @cached_property
    def answers(self) -> dict[Any, Any]:
        """By question."""
        return {}

    @cached_property
    def parameters(self) -> int:
        return sum(named.weight.elements for named in named_weights(self.fields))

    @cached_property
    def tensors(self) -> int:
        """Of the whole model."""
        return sum(1 for _ in named_weights(self.fields))

    def placed(self, stage: int, parallel: ParallelSettings) -> list[PlacedWeight]:
        return self._remembered("placed", stage, parallel, super().placed)

    def windows(self, stage: int, parallel: ParallelSettings) -> list[int | None]:
        return self._remembered("windows", stage, parallel, super().windows)

    def rank_parameters(self, stage: int, parallel: ParallelSettings) -> int:
        name = f"parameters over {parallel.tensor_model_parallel_size}"
        return self._remembered(name, stage, parallel, super().rank_parameters)

    def layers_by_window(self, parallel: ParallelSettings) -> list[Counter[int | None]]:
        """How many layers of each window every stage has."""
        stages = range(parallel.pipeline_model_parallel_size)
        return self._remembered("layers", 0, parallel, lambda *_: [Counter(self.windows(s, parallel)) for s in stages])

    def _remembered(self, name: str, stage: int, parallel: ParallelSettings, ask: Any) -> Any:
        layout = (value for setting, value in vars(parallel).items() if setting not in PLACES_NOTHING)
        key = (name, stage, *layout)
        if key not in self.answers:
            self.answers[key] = ask(stage, parallel)
        return self.answers[key]


def remembered_shape(model: ModelSettings, role: str) -> RememberedShape:
    """
    Raises:
        UserError: as `read_shape` does.
    """
    return RememberedShape(**vars(read_shape(model, role)))
