"""``python -m megatron_sead.launch <torchrun's arguments>``: torchrun that keeps quiet about a user's mistake.

torchrun answers any failed rank with a page of its own and exit code 1. Ranks that end with code 2 have told the user
in one line what to change; that line should be the last, and the code should arrive.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C before any rank is there, torch's import included; torchrun's own handlers follow
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, parse_args, run

GRACE = "--shutdown-timeout=600"  # seconds to finish a step and save after Ctrl-C; torchrun's own 30 are too few


def main(arguments: list[str]) -> int:
    """Run the ranks.

    Returns:
        0 when all is done or a signal ended the run early (saved, to be continued), 2 for a user's mistake, 1 after
        torchrun's account of any other failure.
    """
    # What it would log about a failing rank is in ChildFailedError too
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets it as well, after a paragraph about it
    if GRACE.partition("=")[0] in get_args_parser().format_help():  # newer torch only
        arguments = [GRACE, *arguments]
    try:
        run(parse_args(arguments))
    except SignalException:
        return 0
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
