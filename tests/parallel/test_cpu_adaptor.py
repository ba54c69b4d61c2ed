"""The adaptor: torch answers CUDA's names with the CPU, Megatron's own pieces run, and all of it can be undone.

Each case is a program of its own: the adaptor changes torch for a whole process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
from packaging.version import Version

ADAPT = "import torch\nfrom megatron_sead.parallel.cpu_adaptor import adapt_to_cpu, is_adapted, restore_cuda\n"


def run(program: str) -> str:
    """Standard output of a program that must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ADAPT + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_answers_for_a_gpu() -> None:
    run("""
        adapt_to_cpu()
        cpu = torch.device("cpu")
        x, layer = torch.ones(2), torch.nn.Linear(2, 2)
        made = [torch.zeros(2, device="cuda"), torch.empty(2, device=0, pin_memory=True),
                torch.tensor(1, device="cuda:0"), torch.arange(3, device=torch.cuda.current_device()),
                x.to("cuda"), x.cuda(), x.to(device=torch.device("cuda", 0)), x.new_zeros(3, device="cuda"),
                layer.cuda().weight, layer.to("cuda").weight, x.pin_memory()]
        assert all(tensor.device == cpu for tensor in made)
        assert isinstance(torch.zeros(2), torch.cuda.FloatTensor)
        assert not isinstance(torch.zeros(2), torch.cuda.BFloat16Tensor)
        assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(2).type("torch.cuda.LongTensor").dtype == torch.int64
        assert torch.zeros(2).type(torch.float64).dtype == torch.float64
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            torch.cuda.Event().record()
        torch.cuda.synchronize(), torch.cuda.empty_cache(), torch.cuda.nvtx.range_push("x"), torch.cuda.nvtx.range_pop()
        assert torch.cuda.memory_allocated() == 0 and torch.cuda.mem_get_info()[1] > 0
    """)


def test_tensors_made_inside_backward_are_on_the_cpu() -> None:
    """A TorchFunctionMode would be off there; recompute makes tensors there."""
    run("""
        adapt_to_cpu()

        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return torch.full_like(grad, 2, device="cuda") * grad + torch.zeros(2, device="cuda")

        x = torch.ones(2, requires_grad=True)
        Doubled.apply(x).sum().backward()
        assert x.grad.tolist() == [2, 2]
    """)


def test_a_rank_starts_without_torchs_compiler_and_others_may_compile() -> None:
    run("""
        import sys
        adapt_to_cpu()
        import megatron.core.models.gpt
        assert "torch._inductor.compile_fx" not in sys.modules
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
        adapted = torch.compile
        restore_cuda()
        assert torch.compile is not adapted
    """)


def test_meta_device_contexts_still_work() -> None:
    run("""
        adapt_to_cpu()
        with torch.device("meta"):
            assert torch.empty(2).device.type == "meta"
            assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    """)


def test_seeds_reach_the_one_generator() -> None:
    run("""
        adapt_to_cpu()
        torch.manual_seed(3)  # seeds CUDA too: must not call itself for ever
        expected = torch.rand(4)
        torch.cuda.manual_seed(3)
        assert torch.equal(torch.rand(4), expected)
        state = torch.cuda.get_rng_state()
        expected = torch.rand(4)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4), expected)
    """)


def test_twice_is_once_and_restoring_leaves_torch_as_it_was() -> None:
    out = run("""
        import torch._dynamo  # replaces a few names itself when it is first imported
        before = {(owner.__name__, name): value for owner in (torch, torch.cuda, torch.Tensor, torch.nn.Module)
                  for name, value in vars(owner).items()}
        adapt_to_cpu()
        zeros = torch.zeros
        adapt_to_cpu()
        assert torch.zeros is zeros and is_adapted()
        restore_cuda()
        assert not is_adapted()
        for owner in (torch, torch.cuda, torch.Tensor, torch.nn.Module):
            now = vars(owner)
            for (name_of_owner, name), value in before.items():
                if name_of_owner == owner.__name__ and now.get(name) is not value:
                    print(owner.__name__, name)
        assert torch.zeros(1).type() == "torch.FloatTensor"
    """)
    assert out == ""


def test_too_late_is_an_error() -> None:
    run("""
        import sys, types
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        try:
            adapt_to_cpu()
        except RuntimeError as error:
            assert "before megatron.core is imported" in str(error)
        else:
            raise SystemExit("not refused")
        assert not is_adapted()
    """)


def test_triton_itself_stays_absent() -> None:
    """Others choose kernels by whether triton can be imported: a stand-in must not mislead them."""
    run("""
        import importlib.util
        found = importlib.util.find_spec("triton")
        adapt_to_cpu()
        import megatron.core
        assert importlib.util.find_spec("triton") == found
    """)


def ways_to_recompute() -> list[str]:
    compiles = Version(version("megatron-core")) >= Version("0.17")  # an extension, to recompute norms
    there = not compiles or (shutil.which("ninja") and shutil.which("c++"))
    return ["", "full", "mlp", *(["layernorm"] if there else [])]


@pytest.mark.mcore_lane
def test_a_stock_megatron_model_trains() -> None:
    """Megatron's own GPT layers, DDP, mixed-precision optimizer with clipping, and each way to recompute."""
    out = run(f"""
        adapt_to_cpu()
        import os
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig

        def losses(recompute):
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            how = dict(recompute_granularity="selective", recompute_modules=[recompute]) if recompute else {{}}
            if recompute == "full":
                how = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
            config = TransformerConfig(
                num_layers=2, hidden_size=32, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16,
                attention_dropout=0.0, hidden_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
                gradient_accumulation_fusion=False, persist_layer_norm=False,
                # recompute of "mlp" returns the bias itself, and its backward calls itself for ever
                add_bias_linear=False, **how)
            model = GPTModel(config, get_gpt_layer_local_spec(), 64, 32, position_embedding_type="rope")
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
            model = DistributedDataParallel(config, ddp, model)
            optimizer = get_megatron_optimizer(
                OptimizerConfig(lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True,
                                clip_grad=1.0), [model])
            tokens = torch.arange(16)[None] % 7
            mask = torch.ones(1, 1, 16, 16).triu(1).bool()
            for _ in range(8):
                model.zero_grad_buffer(), optimizer.zero_grad()
                loss = model(tokens, torch.arange(16)[None], mask, labels=tokens.roll(-1)).float().mean()
                loss.backward()
                model.finish_grad_sync()
                assert optimizer.step()[0]
                yield loss.item()

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        for recompute in {ways_to_recompute()}:
            print(*losses(recompute))
    """)
    by_way = [[float(loss) for loss in line.split()] for line in out.splitlines()[-len(ways_to_recompute()) :]]
    assert all(len(losses) == 8 and losses[-1] < 0.5 * losses[0] for losses in by_way)
    assert by_way == [by_way[0]] * len(by_way)  # what is computed again is the same
