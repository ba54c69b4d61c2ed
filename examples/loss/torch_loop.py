"""SEAD in a plain loop of torch and transformers, on the pair in ``examples/tiny``, on a CPU or the first GPU.

    python examples/loss/torch_loop.py --steps 40

A line a step: loss, and the reverse divergence of the step's rollouts, which falls.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sead.distillation import (
    PolicyInput,
    annealing_coefficient,
    assign_zones,
    linear_token_scores,
    linear_weighted_divergence,
    make_policy,
)

TINY = Path(__file__).parents[1] / "tiny"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Shapes: b rollouts, s tokens of a padded prompt and its answer, n response tokens of all, h hidden size, V vocabulary


def write_rollouts(student, tokenizer, prompts: list[str]):
    """The student's answers: tokens [b, s], which of them are no padding, and which are response."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(DEVICE)
    # From the whole distribution, which the divergences are of; generate() may take the 50 likeliest tokens by default
    tokens = student.generate(**asked, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=40)
    written = tokens[:, asked["input_ids"].shape[1] :]
    stops = torch.isin(written, torch.tensor(student.generation_config.eos_token_id, device=DEVICE)).int()
    real = stops.cumsum(1) - stops == 0  # up to the first stop token, itself included
    mask = torch.cat([asked["attention_mask"].bool(), real], dim=1)
    response = torch.cat([torch.zeros_like(asked["attention_mask"], dtype=torch.bool), real], dim=1)
    return tokens, mask, response


def final_hidden(model, tokens, mask, response):
    """[n, h]: the states that predict the response tokens. Those of position t predict token t + 1."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left moves no token
    hidden = model.model(tokens, attention_mask=mask, position_ids=positions).last_hidden_state  # [b, s, h]
    return hidden[:, :-1][response[:, 1:]]


def train_step(student, teacher, optimizer, tokens, mask, response, progress: float) -> tuple[float, float]:
    """One update; loss and mean reverse divergence."""
    hidden, heads = final_hidden(student, tokens, mask, response), (student.lm_head.weight, teacher.lm_head.weight)
    with torch.no_grad():
        teacher_hidden = final_hidden(teacher, tokens, mask, response)
        statistics = linear_token_scores(
            *(hidden, heads[0], teacher_hidden, heads[1], tokens[response]),
            student_stop_token_ids=(),
            teacher_stop_token_ids=(),
        ).statistics  # fields [n]
    every = torch.ones(len(hidden), dtype=torch.bool, device=DEVICE)
    zones = assign_zones(statistics.student_entropy, statistics.teacher_entropy, every)
    rollout, position = response.nonzero().unbind(1)
    weights = make_policy("sead")(
        PolicyInput(statistics, zones, rollout, position, alpha=annealing_coefficient(progress), seed=0)
    )
    losses = linear_weighted_divergence(hidden, heads[0], teacher_hidden, heads[1], weights.forward, weights.reverse)
    teaches = (weights.forward != 0) | (weights.reverse != 0)
    loss = losses.sum() / teaches.sum().clamp(min=1)  # not by all n: zone A has no part in it
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item(), statistics.reverse_kl.mean().item()


def main() -> None:
    """Train, and print each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_pretrained(TINY / name).to(DEVICE) for name in ("student", "teacher"))
    teacher.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student", padding_side="left")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    prompts = [json.loads(line)["prompt"] for line in (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    for step in range(steps):
        asked = [prompts[(32 * step + index) % len(prompts)] for index in range(32)]
        rollouts = write_rollouts(student, tokenizer, asked)
        loss, reverse_kl = train_step(student, teacher, optimizer, *rollouts, progress=step / steps)
        print(f"step {step}: loss {loss:.4f}, reverse KL {reverse_kl:.4f}", flush=True)


if __name__ == "__main__":
    main()
