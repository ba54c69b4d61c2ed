"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes


def machine() -> dict[str, Any]:
    """Processor, cores, and how many processes wanted them on average: measured on a busy machine, numbers are high."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_15_minutes": round(os.getloadavg()[2], 1),
    }
