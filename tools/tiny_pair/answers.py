"""What a model answers: greedy or sampled, in batches, graded by the integer in the last box."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_pair.problems import Problem

MAX_NEW_TOKENS = 40  # the longest solution of level 5 has 39, its end included
BOXED = re.compile(r"\\boxed\{(\d+)\}")


def prompt_token_ids(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The problem as one user turn, up to where the answer starts."""
    messages = [{"role": "user", "content": problem.prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def answer_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    greedy: bool,
    batch_size: int = 500,
) -> list[str]:
    """One response for each problem, special tokens left out; sampling is at temperature 1 from torch's global seed."""
    model.eval()
    responses: list[str] = []
    for start in range(0, len(problems), batch_size):
        prompts = [prompt_token_ids(problem, tokenizer) for problem in problems[start : start + batch_size]]
        width = max(map(len, prompts))
        tokens = torch.full((len(prompts), width), tokenizer.pad_token_id)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = torch.tensor(prompt)
        generated = model.generate(
            tokens,
            attention_mask=(tokens != tokenizer.pad_token_id).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=not greedy,
            **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
        )
        responses += tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return responses


def is_right(problem: Problem, response: str) -> bool:
    """Whether the last box holds the answer."""
    boxes = BOXED.findall(response)
    return bool(boxes) and int(boxes[-1]) == problem.answer


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], *, greedy: bool
) -> float:
    """Share of ``problems`` that one answer each, greedy or sampled, gets right."""
    responses = answer_problems(model, tokenizer, problems, greedy=greedy)
    return sum(map(is_right, problems, responses)) / len(problems)


def pass_rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], samples: int
) -> list[float]:
    """For each problem, the share of ``samples`` sampled answers that is right."""
    repeated = [problem for problem in problems for _ in range(samples)]
    responses = answer_problems(model, tokenizer, repeated, greedy=False)
    right = [is_right(problem, response) for problem, response in zip(repeated, responses, strict=True)]
    return [sum(right[start : start + samples]) / samples for start in range(0, len(right), samples)]
