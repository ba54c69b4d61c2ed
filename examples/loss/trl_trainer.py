"""SEAD in a subclass of TRL's on-policy DistillationTrainer. Needs ``pip install trl==1.16.0`` beside this package.

    python examples/loss/trl_trainer.py --steps 10

distils the pair in ``examples/tiny``. TRL generates, batches, updates and logs. Two things are replaced: once a step's
rollouts are there, both models score them and a policy gives each token its two weights; and the loss of a
micro-batch is `linear_weighted_divergence` with those weights. Neither ever holds the logits of all tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from megatron_sead.distillation import (
    PolicyInput,
    annealing_coefficient,
    assign_zones,
    linear_token_scores,
    linear_weighted_divergence,
    make_policy,
)

TINY = Path(__file__).parents[1] / "tiny"
# Settings of models whose logits are not hidden @ head alone
LOGIT_SETTINGS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "final_logit_softcapping")

# Shapes: b rollouts, c tokens of the longest, n response tokens of all, h hidden size of a model, V vocabulary


class SeadTrainer(DistillationTrainer):
    """DistillationTrainer with the weights of `policy`, one of `megatron_sead.distillation.POLICIES`.

    One process, or several under DDP. ``args.beta`` has no effect, and ``args.temperature`` none on the loss.
    """

    def __init__(self, *args: Any, policy: str = "sead", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Each rank holds rollouts of its own; quantiles are those of all ranks
        self.token_groups = (torch.distributed.group.WORLD,) if self.accelerator.num_processes > 1 else ()
        self.policy = make_policy(policy, groups=self.token_groups)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts of a whole step, and two weights a token. TRL cuts all [b, ...] here into micro-batches."""
        batch = super()._generate_and_score_completions(inputs)
        valid = _response_mask(batch)  # [b, c]
        student_hidden = self._final_hidden(self.model, batch)
        batch["teacher_hidden"] = self._final_hidden(self.teacher_model, batch)
        statistics = linear_token_scores(
            student_hidden[valid],
            _head(self.model),
            batch["teacher_hidden"][valid],
            _head(self.teacher_model),
            batch["completion_ids"][valid],
            student_stop_token_ids=(),
            teacher_stop_token_ids=(),
        ).statistics  # fields [n]
        rollout, position = valid.nonzero().unbind(1)
        weights = self.policy(
            PolicyInput(
                statistics,
                assign_zones(
                    statistics.student_entropy,
                    statistics.teacher_entropy,
                    torch.ones_like(rollout, dtype=torch.bool),
                    groups=self.token_groups,
                ),
                rollout + len(valid) * self.accelerator.process_index,
                position,
                alpha=annealing_coefficient(self.state.global_step / max(1, self.state.max_steps)),
                seed=self.args.seed + self.state.global_step,
            )
        )
        for name, values in (
            ("forward_weight", weights.forward),
            ("reverse_weight", weights.reverse),
            ("student_entropy", statistics.student_entropy),
        ):
            batch[name] = torch.zeros(valid.shape, device=valid.device).masked_scatter(valid, values)
        # The loss is divided by the tokens that teach, of all ranks and micro-batches; TRL counts all tokens
        teaches = (weights.forward != 0) | (weights.reverse != 0)
        batch["num_items_in_batch"] = self.accelerator.gather(teaches.sum()).sum()
        reverse_kl = self.accelerator.gather(statistics.reverse_kl.mean())
        self._metrics["train" if self.model.training else "eval"]["reverse_kl"].append(reverse_kl.mean().item())
        return batch

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of a micro-batch, sum of its student entropies, number of its response tokens.

        `compute_loss` calls it inside the student's DDP wrapper, and has made num_items_in_batch of what was counted
        above; None in evaluation.
        """
        weights = inputs["forward_weight"], inputs["reverse_weight"]
        loss = linear_weighted_divergence(
            self._get_last_hidden_state(unwrapped_student, *_tokens(inputs)),  # [b, c, h]
            _head(unwrapped_student),  # [V, h]
            inputs["teacher_hidden"],
            _head(self.teacher_model),
            *weights,  # zero where nothing is to be learnt: such a token costs nothing
        ).sum()
        if num_items_in_batch is None:
            num_items_in_batch = ((weights[0] != 0) | (weights[1] != 0)).sum().clamp(min=1)
        return loss / num_items_in_batch, inputs["student_entropy"].sum(), _response_mask(inputs).sum()

    @torch.no_grad()
    def _final_hidden(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """[b, c, h], as many rollouts at a time as a micro-batch has."""
        tokens, mask, length = _tokens(batch)
        size = self.args.per_device_train_batch_size
        parts = zip(tokens.split(size), mask.split(size), strict=True)
        return torch.cat([self._get_last_hidden_state(model, *part, length) for part in parts])


def _response_mask(batch: dict[str, Any]) -> torch.Tensor:
    """[b, c] bool: tokens that the student wrote; what a tool answered is not its own."""
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    return mask.bool()


def _tokens(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prompts and responses [b, prompt + c], their mask, and c."""
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return tokens, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1), batch["completion_ids"].shape[1]


def _head(model: Any) -> torch.Tensor:
    """[V, h]. Raises ValueError where logits are more than hidden @ head: such models need `weighted_divergence`."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    more = [name for name in LOGIT_SETTINGS if getattr(config, name, None) not in (None, 1.0)]
    if head.bias is not None:
        more.append("lm_head.bias")
    if more:
        raise ValueError(f"{type(model).__name__}: logits are more than hidden @ head: {', '.join(more)}")
    return head.weight


def arguments_for_tiny_pair(output: str, steps: int) -> dict[str, Any]:
    """What the trainer takes to distil ``examples/tiny``, on a CPU or the first GPU."""
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    settings = DistillationConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_completion_length=40,
        temperature=1.0,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    return {
        "model": str(TINY / "student"),
        "teacher_model": str(TINY / "teacher"),
        "args": settings,
        "train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        "processing_class": AutoTokenizer.from_pretrained(TINY / "student", padding_side="left"),
    }


def main() -> None:
    """Train; TRL prints a line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--policy", default="sead")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        SeadTrainer(policy=chosen.policy, **arguments_for_tiny_pair(output, chosen.steps)).train()


if __name__ == "__main__":
    main()
