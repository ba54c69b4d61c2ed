"""The loss in a plain Megatron-Core training loop, under tensor, pipeline and data parallelism.

    torchrun --nproc-per-node 4 examples/loss/megatron_loop.py --tensor 2 --pipeline 2

Two random models, random tokens in place of rollouts, ten steps. Everything but the loss is Megatron-Core's own.
"""

import argparse
from functools import partial

import torch

from megatron_sead.distillation import linear_weighted_divergence

BACKEND = "nccl" if torch.cuda.is_available() else "gloo"
if BACKEND == "gloo":  # Megatron-Core assumes a GPU; this lets it run without one, and must come before its import
    from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

    adapt_to_cpu()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.distributed import DistributedDataParallel as DDP  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

VOCAB, PADDED = 1003, 1024  # true size, and what tensor parallelism makes of it
LENGTH, PROMPT, BATCH, MICRO_BATCHES = 32, 8, 4, 2  # tokens of a sequence and of its prompt; sequences; a step
ALPHA = 0.5  # share of forward KL; any policy that gives two weights a token does

# Shapes: s tokens of a sequence, b sequences, h hidden size of a model, V padded vocabulary, tp tensor-parallel ranks


class HiddenStateModel(GPTModel):
    """GPTModel that hands out its final hidden states [s, b, h]: the loss owns the head."""

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states


def build_model(hidden_size: int, init_std: float) -> HiddenStateModel:
    """This rank's part of a random model, the same whatever the tensor parallelism."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=hidden_size,
        num_attention_heads=4,
        init_method_std=init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,  # drawn whole, then cut
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,  # gradients are divided by the tokens of all ranks and micro-batches
    )
    return HiddenStateModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),  # only this stage has a head
    ).cuda()


def make_rollouts(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This data-parallel rank's micro-batches: tokens [b, s]; 1 where a response token is predicted, else 0 [s, b]."""
    generator = torch.Generator().manual_seed(1000 * step + mpu.get_data_parallel_rank())
    tokens = torch.randint(0, VOCAB, (MICRO_BATCHES, BATCH, LENGTH), generator=generator)
    predicts = torch.zeros(LENGTH, BATCH)
    predicts[PROMPT - 1 : -1] = 1  # position t predicts token t + 1
    return [(micro_batch.cuda(), predicts.cuda()) for micro_batch in tokens]


def run(model, rollouts, on_hidden, *, forward_only: bool) -> list:
    """Send the micro-batches through the pipeline; what on_hidden made of each, on the last stage."""

    def forward_step(iterator, model):
        index, (tokens, _) = next(iterator)
        positions = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
        return model(tokens, positions, attention_mask=None), partial(on_hidden, index)

    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(enumerate(rollouts)),
            model=model,
            num_microbatches=len(rollouts),
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def train_step(student, teacher, optimizer, step: int) -> float:
    """One update; the mean loss of this rank's response tokens, on the last pipeline stage."""
    rollouts = make_rollouts(step)
    teacher_hidden = run(teacher, rollouts, lambda index, hidden, non_loss_data: hidden, forward_only=True)

    def distill(index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, predicts = rollouts[index]
        loss = linear_weighted_divergence(
            hidden,  # [s, b, h], the same on every tensor-parallel rank
            student.module.output_layer.weight,  # [V/tp, h]
            teacher_hidden[index],
            teacher.output_layer.weight,
            ALPHA * predicts,  # zero on the prompt, which then costs nothing
            (1 - ALPHA) * predicts,
            group=mpu.get_tensor_model_parallel_group(),
            vocab_size=VOCAB,
        ).sum()
        return loss, predicts.sum().int(), loss.detach() / predicts.sum()

    student.zero_grad_buffer()
    optimizer.zero_grad()
    losses = run(student, rollouts, distill, forward_only=False)
    optimizer.step()
    return float(sum(losses)) / MICRO_BATCHES


def main() -> None:
    """Train, and print each step's loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in ("--tensor", 1), ("--pipeline", 1), ("--steps", 10):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    torch.distributed.init_process_group(BACKEND)
    torch.cuda.set_device(torch.distributed.get_rank() % torch.cuda.device_count())
    mpu.initialize_model_parallel(tensor_model_parallel_size=args.tensor, pipeline_model_parallel_size=args.pipeline)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    teacher = build_model(hidden_size=64, init_std=0.1).requires_grad_(False).eval()
    model = build_model(hidden_size=32, init_std=0.02)
    student = DDP(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), [student])
    model.config.finalize_model_grads_func = finalize_model_grads
    for step in range(args.steps):
        loss = train_step(student, teacher, optimizer, step)
        if mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == mpu.get_data_parallel_rank() == 0:
            print(f"step {step}: loss {loss:.7f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
