"""Other systems' released losses, called as their own trainers call them. None of their code is here.

Each function imports what it needs, so that a peer that is not installed is absent and no more than that. Where a
peer computes less (one divergence, no weights, the likeliest tokens only), it is asked for what it can, and its
`Computes` says so: the comparison is then in its favour.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from loss_benchmark.cases import FUSED, LOGITS, Computes, Inputs, Loss

FORWARD = Computes(reverse=False)
UNWEIGHTED = Computes(reverse=False, weighted=False)
TOP = Computes(reverse=False, top=128)  # verl's default
IGNORED = -100
Step = Callable[[], Any]


def trl(inputs: Inputs) -> Step:
    """Tokens without weight are left out by hand, as its trainer does where it has Triton."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    weight = inputs.weights(FORWARD)[0][inputs.active]

    def step() -> None:
        divergence, _ = ChunkedDivergenceFunction.apply(
            inputs.student[inputs.active],
            inputs.heads[0],
            None,
            inputs.teacher[inputs.active],
            inputs.heads[1],
            None,
            0.0,
        )
        (weight * divergence).sum().backward()

    return step


def modelopt(inputs: Inputs) -> Step:
    """Its loss of a rank is that rank's part; its trainer sums the parts, hence the last collective."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss_function = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=inputs.case.tp))
    weight = inputs.weights(FORWARD)[0]

    def step() -> None:
        # [s, b, V/tp] in, [b, s] out
        part, must_sum, _ = loss_function(inputs.student.unsqueeze(1), inputs.teacher.unsqueeze(1))
        total = (weight * part[0]).sum()
        total.backward()
        if must_sum and inputs.case.tp > 1:
            dist.all_reduce(total.detach(), group=inputs.group)

    return step


def verl(inputs: Inputs) -> Step:
    """The teacher's likeliest tokens come from elsewhere in verl, so finding them is not timed."""
    from verl.trainer.distillation.megatron.losses import _VocabParallelKLDivergence

    log_probabilities, tokens = _top(inputs, TOP.top or 0)
    weight = inputs.weights(TOP)[0]

    def step() -> None:
        divergence = _VocabParallelKLDivergence.apply(inputs.student, log_probabilities, tokens, None)[0]
        (weight * divergence).sum().backward()

    return step


def _top(inputs: Inputs, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, k] and tokens [T, k] of the whole vocabulary, a few rows at a time."""
    values, tokens = [], []
    for rows in inputs.teacher.split(64):
        shards = [torch.empty_like(rows) for _ in range(inputs.case.tp)]
        dist.all_gather(shards, rows.contiguous(), group=inputs.group)
        best = torch.cat(shards, dim=-1).float().log_softmax(-1).topk(count, dim=-1)
        values.append(best.values)
        tokens.append(best.indices)
    return torch.cat(values), torch.cat(tokens)


def ms_swift(inputs: Inputs) -> Step:
    """Tokens without weight are masked by their labels."""
    from swift.megatron.trainers.vocab_parallel_utils import vocab_parallel_kl_div, vocab_parallel_log_softmax
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    teacher = TeacherOutput(full_logits=inputs.teacher.unsqueeze(0))
    labels = _labels(inputs).unsqueeze(0)

    def step() -> None:
        total, _ = gkd_loss(
            inputs.student.unsqueeze(0),
            teacher,
            labels,
            beta=0.0,
            temperature=1.0,
            log_softmax_fn=vocab_parallel_log_softmax,
            kl_div_fn=vocab_parallel_kl_div,
        )
        total.backward()

    return step


def liger(inputs: Inputs) -> Step:
    """Its JSD at beta 0 is the forward divergence; it gives a mean."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss_function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels, count = _labels(inputs), inputs.case.active

    def step() -> None:
        mean = loss_function(inputs.student, inputs.heads[0], inputs.teacher, inputs.heads[1], labels)
        (mean * count).backward()

    return step


def orda(inputs: Inputs) -> Step:
    """On a CPU it runs its reference in torch, which makes whole logits."""
    from orda_kernel import SeparateTeacher, distillation_loss

    labels = _labels(inputs)

    def step() -> None:
        distillation_loss(
            inputs.student,
            inputs.heads[0],
            labels,
            SeparateTeacher(inputs.teacher, inputs.heads[1]),
            student_ce_weight=0.0,
            kl_weight=1.0,
            kl_divergence="forward",
            reduction="sum",
        ).loss.backward()

    return step


def _labels(inputs: Inputs) -> torch.Tensor:
    """[T]: IGNORED where a token has no weight, else a token that plays no part."""
    return torch.where(inputs.active, 0, IGNORED)


PEERS = (
    Loss("TRL", "trl", FUSED, FORWARD, trl, 2, tensor_parallel=False, requires=("trl.kernels.chunked_divergence",)),
    Loss(
        "ModelOpt",
        "modelopt",
        LOGITS,
        FORWARD,
        modelopt,
        8,
        requires=("modelopt.torch.distill.plugins.megatron",),
        uses_megatron=True,
    ),
    Loss(
        "verl",
        "verl",
        LOGITS,
        TOP,
        verl,
        5,
        requires=("verl.trainer.distillation.megatron.losses",),
        uses_megatron=True,
    ),
    Loss(
        "ms-swift",
        "ms-swift",
        LOGITS,
        UNWEIGHTED,
        ms_swift,
        6,
        requires=("swift.megatron.trainers.vocab_parallel_utils", "swift.rlhf_trainers.gkd_loss"),
        uses_megatron=True,
    ),
    Loss(
        "Liger",
        "liger",
        FUSED,
        UNWEIGHTED,
        liger,
        6,
        tensor_parallel=False,
        requires=("liger_kernel.chunked_loss.jsd_loss",),
    ),
    Loss("orda-kernel", "orda", FUSED, UNWEIGHTED, orda, 8, tensor_parallel=False, requires=("orda_kernel",)),
)
PACKAGES = {
    "trl": "trl",
    "modelopt": "nvidia-modelopt",
    "verl": "verl",
    "ms-swift": "ms-swift",
    "liger": "liger-kernel",
    "orda": "orda-kernel",
}
