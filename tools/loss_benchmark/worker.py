"""One rank: ``python worker.py SETTINGS.json RANK``. Rank 0 prints one JSON object a line, see `Reporter`.

Started by `launch.py`, once for times and once for memory, since memory needs a malloc that gives everything back.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import traceback
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.pop(0)  # this folder, whose modules have names that a peer's may have too
sys.path.insert(0, str(Path(__file__).parents[1]))

from loss_benchmark import meters
from loss_benchmark.cases import Case, Inputs, Loss, make_inputs
from loss_benchmark.ceilings import device_ceilings
from loss_benchmark.reference import gradient_errors
from loss_benchmark.registry import all_losses

LEAST_ROUNDS = 3
TIMEOUT = timedelta(minutes=10)  # of a collective, compilation on another rank included


class Reporter:
    """Rank 0's lines: {"kind": "result" | "failed" | "absent" | "facts" | "doing", ...}. Peers may print at will."""

    def __init__(self, rank: int) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8") if rank == 0 else None
        os.dup2(2, 1)  # whatever else is printed goes to stderr

    def __call__(self, kind: str, **values: Any) -> None:
        if self._out is not None:
            print(json.dumps({"kind": kind, **values}, allow_nan=False), file=self._out, flush=True)


def main(settings: dict[str, Any], rank: int) -> None:
    """Measure every case with every loss that fits."""
    report = Reporter(rank)
    torch.set_num_threads(settings["threads"])
    on_cuda = settings["device"] == "cuda"
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.FileStore(settings["store"], settings["tp"]),
        rank=rank,
        world_size=settings["tp"],
        timeout=TIMEOUT,
    )
    losses, absent = _usable(settings, report)
    report("facts", versions=_versions(losses), **({"ceilings": device_ceilings(device)} if on_cuda else {}))
    errors: dict[Case, dict[int, dict[str, Any]]] = {}  # the same for all numbers of tokens
    for fields, indices in settings["cases"]:
        case = Case(**fields)
        chosen = [(index, losses[index]) for index in indices if index not in absent]
        if settings["measure"] == "time":
            _measure_times(case, chosen, settings, device, report)
        else:
            small = dataclasses.replace(case, tokens=settings["error_tokens"])
            known = errors.setdefault(small, {})
            known |= _measure_errors(small, [pair for pair in chosen if pair[0] not in known], device, report)
            for index in known.keys() & dict(chosen).keys():
                report(**known[index], case=_fields(case), loss=index)
            _measure_memory(case, chosen, device, report)
    dist.destroy_process_group()


def _usable(settings: dict[str, Any], report: Reporter) -> tuple[list[Loss], set[int]]:
    """All losses, and the indices of those whose packages do not import here. Ranks agree."""
    losses = all_losses([Path(path) for path in settings["also"]])
    wanted = {index for _, indices in settings["cases"] for index in indices}
    if any(losses[index].uses_megatron for index in wanted):
        _start_megatron(settings["tp"])
    absent = set()
    for index in sorted(wanted):
        reason = _import_error(losses[index])
        reasons = [None] * settings["tp"]
        dist.all_gather_object(reasons, reason)
        if any(reasons):
            absent.add(index)
            report("absent", loss=index, reason=next(filter(None, reasons)))
    return losses, absent


def _import_error(loss: Loss) -> str | None:
    try:
        for module in loss.requires:
            importlib.import_module(module)
    except Exception as error:  # a package may raise anything while it is imported
        return _one_line(error)
    return None


def _start_megatron(tp: int) -> None:
    if importlib.util.find_spec("megatron.core") is not None:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)


def _measure_times(
    case: Case, losses: list[tuple[int, Loss]], settings: dict[str, Any], device: torch.device, report: Reporter
) -> None:
    """Interleaved rounds, each beginning with another loss; slow ones take part in fewer of them."""
    inputs = make_inputs(case, device)
    steps, rounds = {}, {}
    for index, loss in losses:
        report("doing", text=f"{_title(case)}: {loss.name}, first call")
        try:
            step = loss.build(inputs)
            meters.seconds(step, device)  # compilation, caches, lazy initialisation
            once = _slowest_rank([_timed(step, inputs, loss, device)], device)[0]
        except Exception as error:
            report("failed", case=_fields(case), loss=index, reason=_one_line(error))
            continue
        finally:
            _clean(inputs, loss)
        steps[index] = step, loss
        rounds[index] = max(LEAST_ROUNDS, min(settings["rounds"], int(settings["budget"] / max(once, 1e-9))))
    samples: dict[int, list[float]] = {index: [] for index in steps}
    order = list(steps)
    for number in range(settings["rounds"]):
        report("doing", text=f"{_title(case)}: round {number + 1} of {settings['rounds']}")
        for index in order[number % max(1, len(order)) :] + order[: number % max(1, len(order))]:
            if number < rounds[index]:
                samples[index].append(_timed(*steps[index][:1], inputs, steps[index][1], device))
    for index, own in samples.items():
        slowest = _slowest_rank(own, device)
        times = {"median_seconds": statistics.median(slowest), "min_seconds": min(slowest), "samples": len(slowest)}
        report("result", case=_fields(case), loss=index, **times)


def _timed(step: Any, inputs: Inputs, loss: Loss, device: torch.device) -> float:
    dist.barrier()
    elapsed = meters.seconds(step, device)
    _clean(inputs, loss)
    return elapsed


def _clean(inputs: Inputs, loss: Loss) -> None:
    inputs.forget_gradients()
    if loss.overwrites:
        inputs.restore()


def _slowest_rank(own: list[float], device: torch.device) -> list[float]:
    """A step is over when the last rank is done."""
    times = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    values: list[float] = times.tolist()
    return values


def _measure_errors(
    case: Case, losses: list[tuple[int, Loss]], device: torch.device, report: Reporter
) -> dict[int, dict[str, Any]]:
    """Gradient error and collectives by loss, on few tokens with the true vocabulary: fp64 has to fit."""
    inputs = make_inputs(case, device)
    found: dict[int, dict[str, Any]] = {}
    for index, loss in losses:
        if loss.computes is None:
            continue
        report("doing", text=f"{_title(case)}: {loss.name}, gradient against fp64")
        try:
            step = loss.build(inputs)
            step()
            if loss.overwrites:
                gradient = inputs.student.grad.clone() if inputs.student.grad is not None else None
                inputs.restore()
                inputs.student.grad = gradient
            errors = gradient_errors(inputs, loss.computes)
            _clean(inputs, loss)
            count = meters.collectives(step)  # after it has run, and compiled, as it should
            finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
            found[index] = {"kind": "result", "collectives": count, "gradient_errors": finite}
        except Exception as error:
            found[index] = {"kind": "failed", "reason": _one_line(error)}
        finally:
            _clean(inputs, loss)
    return found


def _measure_memory(case: Case, losses: list[tuple[int, Loss]], device: torch.device, report: Reporter) -> None:
    """The second call's peak, and what of it are gradients. The first pays for code, compilers and lazy set-up."""
    inputs = make_inputs(case, device)
    for index, loss in losses:
        if loss.computes is None:
            continue
        report("doing", text=f"{_title(case)}: {loss.name}, memory")
        try:
            step = loss.build(inputs)
            step()
            _clean(inputs, loss)
            peak = meters.peak_bytes(step, device)
            gradients = _gradient_bytes(inputs)
        except Exception as error:
            report("failed", case=_fields(case), loss=index, reason=_one_line(error))
            continue
        finally:
            _clean(inputs, loss)
        everyone: list[int | None] = [None] * case.tp
        dist.all_gather_object(everyone, peak)
        known = [value for value in everyone if value is not None]
        if known:
            report("result", case=_fields(case), loss=index, peak_bytes=max(known), gradient_bytes=gradients)


def _gradient_bytes(inputs: Inputs) -> int:
    """Of the leaves' gradients that have memory of their own."""
    return sum(
        leaf.grad.untyped_storage().nbytes()
        for leaf in inputs.leaves.values()
        if leaf.grad is not None and leaf.grad.data_ptr() != leaf.data_ptr()
    )


def _versions(losses: list[Loss]) -> dict[str, str]:
    """Of whatever may have been measured or decides how fast it is."""
    from loss_benchmark.peers import PACKAGES

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "megatron-core", *PACKAGES.values()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _fields(case: Case) -> dict[str, Any]:
    return dict(vars(case))


def _title(case: Case) -> str:
    return f"{case.form}, {case.dtype}, TP {case.tp}, {case.tokens} tokens, {case.share:.0%} active"


def _one_line(error: Exception) -> str:
    traceback.print_exception(error)  # to the rank's log
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:200]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2]))
