"""``python -m megatron_sead.launch <torchrun's arguments>``: torchrun that keeps quiet about a user's mistake.

torchrun answers any failed rank with a page of its own and exit code 1. Ranks that end with code 2 have told the user
in one line what to change; that line should be the last, and the code should arrive.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: list[str]) -> int:
    """Run the ranks; the exit code is 0, 2 for a user's mistake, or 1 after torchrun's account of what failed."""
    # What it would log of a failing rank is in ChildFailedError too
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
