"""Check 0: what is installed, what the card can do at most, and whether NCCL and gloo answer."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from tests.gpu.check import CUDA, DEVICE, Report, copy_rate, seconds

PACKAGES = ("torch", "triton", "transformers", "megatron-core", "pydantic", "transformer-engine", "vllm")
SIDE = 8192 if CUDA else 64


def ceilings(report: Report) -> None:
    report.add(python=platform.python_version(), versions={name: _version(name) for name in PACKAGES})
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        report.add(
            device=properties.name,
            capability=list(torch.cuda.get_device_capability()),
            gib_free=torch.cuda.mem_get_info()[0] / 2**30,
            tf32_matmul=torch.backends.cuda.matmul.allow_tf32,
            cudnn=torch.backends.cudnn.version(),
            cudnn_sdp=torch.backends.cuda.cudnn_sdp_enabled(),
            nccl=list(torch.cuda.nccl.version()),
        )
    rate = copy_rate()
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * SIDE**3 / seconds(lambda: a @ b, repeats=10)
    report.add(copy_gb_per_second=rate / 1e9, bf16_tflops=flops / 1e12)
    report.expect("copy", rate > 2.5e12 or not CUDA, "about 3 TB/s, read and written")
    report.expect("product", flops > 600e12 or not CUDA, "700 to 800 TFLOP/s")
    report.attempt("groups", lambda: _groups(report))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _groups(report: Report) -> None:
    dist.init_process_group("nccl" if CUDA else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(4, device=DEVICE)
    dist.all_reduce(ones)
    gathered: list[object] = [None]
    dist.all_gather_object(gathered, {"a": 1}, group=dist.new_group(backend="gloo"))
    report.expect("groups", bool((ones == 1).all()) and gathered == [{"a": 1}], "one rank of NCCL, and of gloo")
    dist.destroy_process_group()
