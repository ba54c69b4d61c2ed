"""What a process says can be said on any terminal."""

from __future__ import annotations

import io
import os
import sys


def forgive_streams() -> None:
    """Characters that a terminal's encoding lacks are written as escapes; what was closed takes everything."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
