"""What is measured on what: sizes, and the tensors that all losses share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# Shapes: T tokens; V vocabulary; h hidden size

LOGITS, FUSED = "logits", "fused"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 512  # rows of logits that are drawn; the others repeat them, which no implementation can notice


@dataclass(frozen=True)
class Case:
    """One row of cells: the same tensors for all losses."""

    form: str  # LOGITS or FUSED
    tokens: int
    vocab: int
    hidden: int
    dtype: str
    tp: int
    share: float  # of the tokens that have a weight

    @property
    def columns(self) -> int:
        """Of the vocabulary, on one rank."""
        return self.vocab // self.tp

    @property
    def unit(self) -> int:
        """Bytes of one fp32 [T, V/tp]."""
        return self.tokens * self.columns * 4

    @property
    def active(self) -> int:
        """Tokens that have a weight; at least one."""
        return max(1, round(self.tokens * self.share))

    @property
    def input_bytes(self) -> int:
        """Of one rank."""
        size = DTYPES[self.dtype].itemsize
        if self.form == LOGITS:
            return 2 * self.tokens * self.columns * size + min(self.tokens, BLOCK) * self.columns * size
        return 2 * (self.columns + self.tokens) * self.hidden * size


@dataclass(frozen=True)
class Computes:
    """Which function of the two distributions a loss is; the sum over tokens."""

    forward: bool = True
    reverse: bool = True
    weighted: bool = True  # a weight for every token; otherwise one, or zero where the token is masked
    top: int | None = None  # FKL over the teacher's likeliest tokens only, not normalised

    def __str__(self) -> str:
        terms = {
            "w_f·FKL" if self.weighted else "FKL": self.forward,
            "w_r·RKL" if self.weighted else "RKL": self.reverse,
        }
        text = " + ".join(term for term, wanted in terms.items() if wanted)
        return text + (f", top {self.top}" if self.top else "")


@dataclass
class Inputs:
    """A rank's tensors of one case."""

    case: Case
    group: ProcessGroup  # also at TP 1, where it has one member
    student: torch.Tensor  # LOGITS: [T, V/tp], a leaf; FUSED: hidden states [T, h], a leaf, the same on every rank
    teacher: torch.Tensor
    active: torch.Tensor  # bool [T]
    random_weights: torch.Tensor  # [2, T] in [0, 1)
    heads: tuple[torch.Tensor, ...] = ()  # FUSED: student's [V/tp, h], a leaf, and teacher's
    block: torch.Tensor | None = None  # LOGITS: the student's first rows, to restore all from

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """Tensors whose gradient is wanted."""
        return {"hidden": self.student, "head": self.heads[0]} if self.heads else {"logits": self.student}

    def weights(self, computes: Computes) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] each, of the forward and the reverse divergence."""
        values = self.random_weights if computes.weighted else torch.ones_like(self.random_weights)
        values = values * self.active
        return values[0] * computes.forward, values[1] * computes.reverse

    def forget_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def restore(self) -> None:
        """Student logits as they were, after a loss that overwrote them."""
        if self.block is not None:
            _repeat(self.block, self.student.detach())


@dataclass(frozen=True)
class Loss:
    """One implementation: its name, what it computes, and how to make a step of it."""

    name: str
    family: str  # what --only selects
    form: str
    computes: Computes | None  # None: a floor, which is no loss
    build: Callable[[Inputs], Callable[[], Any]]  # untimed preparation; the step is forward and backward
    copies: float  # fp32 [T, V/tp] that it holds at most beyond the inputs, to foresee what does not fit
    tensor_parallel: bool = True
    overwrites: bool = False  # the student's logits
    requires: tuple[str, ...] = ()  # modules to import
    uses_megatron: bool = False  # its group comes from Megatron-Core's global state

    def needed_bytes(self, case: Case) -> int:
        """Of all ranks at the peak, about: inputs, the floors' buffers, the loss and its gradients."""
        gradients = 2 * case.columns * case.hidden * 4 if case.form == FUSED else 0
        floors = 2 * min(case.tokens, FLOOR_ROWS) * case.columns * DTYPES[case.dtype].itemsize
        return int(case.tp * (case.input_bytes + floors + gradients + self.copies * case.unit))


FLOOR_ROWS = 2048  # logits that a floor's preallocated buffers hold at a time


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """This rank's, over all ranks there are: the same values whatever the split.

    Student and teacher are correlated, as a student in training and its teacher are.
    """
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    active = torch.zeros(case.tokens, dtype=torch.bool)
    active[torch.randperm(case.tokens, generator=generator)[: case.active]] = True
    weights = torch.rand(2, case.tokens, generator=generator)
    rank = dist.get_rank(group)
    columns = slice(rank * case.columns, (rank + 1) * case.columns)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=DTYPES[case.dtype])

    block: torch.Tensor | None = None
    heads: tuple[torch.Tensor, ...] = ()
    if case.form == LOGITS:
        logits = 3 * torch.randn(min(case.tokens, BLOCK), case.vocab, generator=generator)
        teacher_logits = logits + torch.randn(logits.shape, generator=generator)
        block, teacher_block = (place(whole[:, columns].contiguous()) for whole in (logits, teacher_logits))
        student = _repeat(block, block.new_empty(case.tokens, case.columns))
        teacher = _repeat(teacher_block, block.new_empty(case.tokens, case.columns))
    else:
        scale = 3 / case.hidden**0.5  # logits with a standard deviation of 3
        hidden = torch.randn(case.tokens, case.hidden, generator=generator)
        student, teacher = place(hidden), place(hidden + torch.randn(hidden.shape, generator=generator) / 3)
        head = scale * torch.randn(case.vocab, case.hidden, generator=generator)
        teacher_head = head + scale / 3 * torch.randn(head.shape, generator=generator)
        heads = place(head[columns].clone()).requires_grad_(), place(teacher_head[columns].clone())
    return Inputs(case, group, student.requires_grad_(), teacher, active.to(device), weights.to(device), heads, block)


def _repeat(block: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    for start in range(0, len(out), len(block)):
        part = out[start : start + len(block)]
        part.copy_(block[: len(part)])
    return out
