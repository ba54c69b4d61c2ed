"""torchrun that leaves the telling of failures to the ranks.

torchrun answers any failed rank with a page of its own and exit code 1. Our ranks tell a failure themselves, and once:
their account should be the last, and their exit code should arrive.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from argparse import Namespace

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, parse_args, run

from megatron_sead.errors import UserError
from megatron_sead.launch import CONTINUES
from megatron_sead.launch.meeting import tell_who_is_waited_for
from megatron_sead.launch.streams import forgive_streams

GRACE = "--shutdown-timeout=600"  # seconds to finish a step and save after Ctrl-C; torchrun's own 30 are too few


def main(arguments: list[str]) -> int:
    """Run the ranks.

    Returns:
        0 when all is done or a signal ended the run early (saved, to be continued), 2 for a user's mistake, 1 for any
        other failure. A rank tells its own; one that was killed could not, and is told here.
    """
    forgive_streams()
    # What it would log about a failing rank is in ChildFailedError too
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets it as well, after a paragraph about it
    known = get_args_parser().format_help()  # newer torch only
    arguments = [option for option in (GRACE, *_signals()) if option.partition("=")[0] in known] + arguments
    place = ""
    try:
        parsed = _checked(arguments)
        nodes = int(str(parsed.nnodes).rpartition(":")[2])
        if nodes > 1:
            place = parsed.rdzv_endpoint or f"{parsed.master_addr}:{parsed.master_port}"
            tell_who_is_waited_for(place, int(parsed.node_rank), nodes)
        run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DistError as error:
        if not place:
            raise
        print(f"error: the nodes did not meet at {place}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except SignalException:
        return 0
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if not codes & {1, 2}:
            print(f"error: {_account_of(*error.get_first_failure())}", file=sys.stderr)
        return 2 if 2 in codes else 1
    return 0


def _signals() -> list[str]:
    """nohup lets a run outlive its terminal, whose signal torchrun would end it by all the same."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"] if ignored else []


def _checked(arguments: list[str]) -> Namespace:
    """torchrun's arguments; it finds the same mistakes, in a traceback.

    Raises:
        UserError: ranks or nodes that are no number.
    """
    parsed: Namespace = parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d{0,5}|gpu|cpu|auto|xpu", str(parsed.nproc_per_node), re.ASCII):
        raise UserError(f"--nproc-per-node {parsed.nproc_per_node}: must be a number of ranks of at least 1")
    if not re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", str(parsed.nnodes), re.ASCII):
        raise UserError(f"--nnodes {parsed.nnodes}: must be a number of nodes of at least 1")
    return parsed


def _account_of(rank: int, failure: ProcessFailure) -> str:
    process = f"rank {rank} (process {failure.pid})"
    if failure.exitcode >= 0:
        return f"{process} ended with exit code {failure.exitcode}"
    number = -failure.exitcode
    name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
    cause = ": by hand, or by the system for want of memory" if number == signal.SIGKILL else ""
    return f"{process} was ended by {name}{cause}{CONTINUES}"
