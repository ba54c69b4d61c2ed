"""What a machine does a second: for the predictions of a plan and of a trace. No torch here."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_sead.config.settings import Settings
from megatron_sead.config.settings_file import load_settings

RATES = Path(__file__).with_name("rates.yaml")
CPU_RATES = Path(__file__).with_name("rates_cpu.yaml")


class Rates(Settings):
    """What a machine does a second. Of a part that is used well: rates that runs reach, not those of a data sheet."""

    bf16_tflops: float = Field(gt=0, description="of large bf16 matrix products and of attention")
    fp32_tflops: float = Field(gt=0, description="of fp32 products")
    memory_gb: float = Field(gt=0, description="GB/s of the GPU's memory, read and written together")
    kernel_microseconds: float = Field(ge=0, description="that any operation on the GPU takes at least")
    gpus_per_node: int = Field(ge=1, description="ranks that reach each other by the fast links")
    node_link_gb: float = Field(gt=0, description="GB/s a GPU, one way, within a node")
    network_gb: float = Field(gt=0, description="GB/s a GPU, one way, between nodes")
    collective_microseconds: float = Field(ge=0, description="that any collective takes at least")
    host_link_gb: float = Field(gt=0, description="GB/s between pinned host memory and the GPU")
    pageable_host_link_gb: float = Field(gt=0, description="GB/s between other host memory and the GPU")
    disk_gb: float = Field(2.0, gt=0, description="GB/s that a node writes of a checkpoint")
    # What runs have shown: measured seconds over those that the rates above predict
    decode_calls: float = Field(1.0, gt=0, description="factor on the fixed seconds of a decoding step")
    decode_work: float = Field(1.0, gt=0, description="factor on a decoding step's seconds for each rollout")
    update: float = Field(1.0, gt=0, description="factor on the seconds of giving the engine new weights")

    def link(self, *, within: bool) -> str:
        """The rate of messages within a node, or between nodes."""
        return "node_link_gb" if within else "network_gb"


def load_rates(path: Path | None = None, overrides: list[str] | None = None, *, device: str = "cuda") -> Rates:
    """
    Args:
        path: None: those that are shipped for the device.
        overrides: such as ``network_gb=25``.

    Raises:
        UserError: as settings do.
    """
    return load_settings(Rates, path or (RATES if device == "cuda" else CPU_RATES), overrides or [])
