"""Imported for what it leaves in the process: Megatron, adapted to the CPU, and all that a run imports."""

from __future__ import annotations

from importlib import import_module

from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

adapt_to_cpu()
import_module("megatron_sead.training.loop")
