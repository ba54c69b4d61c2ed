"""Every check in a process of its own with a limit of its own; a JSON line each as it ends, and a table at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEADLINE = 450.0  # seconds of all checks; what has not begun by then is skipped
HAS_GPU = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
PATIENCE = 1 if HAS_GPU else 6  # a CPU may be slow and shared, and costs nothing to wait for
TAIL = 12  # lines of a failed check's output


@dataclass(frozen=True)
class Check:
    """`number` as the results name it; the function `name` of tests.gpu.`module`, and the seconds that it may take."""

    number: str
    module: str
    name: str
    limit: float


CHECKS = (  # the most informative first
    Check("0", "ceilings", "ceilings", 60),
    Check("5", "tiny_pair", "tiny_pair", 130),
    Check("1", "kernels", "triton_kernels", 120),
    Check("3", "loss", "logits_loss", 60),
    Check("4", "loss", "fused_loss", 60),
    Check("2", "attention", "attention", 90),
    Check("6", "parity", "parity", 90),
    Check("8", "training", "training_recompute_full", 90),
    Check("8b", "training", "training_recompute_none", 80),
    Check("7", "teacher", "teacher", 90),
    Check("9", "engine", "vllm", 120),
)


def main(output: Path, chosen: list[str], checks: tuple[Check, ...] = CHECKS) -> int:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        print(f"error: {output}: is there already; name a new or an empty folder for the results", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = []
    for check in checks:
        if chosen and check.number not in chosen:
            continue
        left = PATIENCE * DEADLINE - (time.monotonic() - started)
        result = run(check, output, min(PATIENCE * check.limit, left)) if left > 10 else _record(check, "out of time")
        results.append(result)
        line = json.dumps(result)
        with (output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
    print(table(results), flush=True)
    return 0 if all(result["ok"] for result in results) else 1


def run(check: Check, output: Path, limit: float) -> dict[str, Any]:
    """One check in a process group of its own, which ends with it."""
    place, log = output / f"{check.name}.json", output / f"{check.name}.log"
    place.unlink(missing_ok=True)
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.gpu.check", check.module, check.name, str(place)]
    error = None
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if process.wait(limit):
                error = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            error = f"still running after {limit:.0f} s"
        _end(process)
    result = _record(check, error) | {"seconds": round(time.monotonic() - started, 1)}
    if place.exists():
        result |= json.loads(place.read_text(encoding="utf-8"))
    if error:
        result["ok"] = False
        result["error"] = "\n".join([error, *log.read_text(errors="replace").splitlines()[-TAIL:]])
    return result


def _record(check: Check, error: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"check": check.number, "name": check.name, "ok": False, "seconds": 0.0}
    return fields | {"numbers": {}, "expected": {}, "error": error}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The check and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'check':<5} {'name':<26} {'ok':<5} {'seconds':>7}  what failed"]
    for result in results:
        failed = [text for text in result["expected"].values() if text.startswith("no")]
        failed += (result["error"] or "").strip().splitlines()[-1:]
        facts = f"{result['check']:<5} {result['name']:<26} {result['ok']!s:<5} {result['seconds']:>7}"
        lines.append(f"{facts}  {'; '.join(failed)[:400]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
