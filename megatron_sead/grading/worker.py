"""The process that compares answers with Math-Verify: ``python -m megatron_sead.grading.worker``.

Reads a JSON object ``{"reference": ..., "given": ..., "seconds": ...}`` a line, writes ``true`` or ``false`` a line,
and ends with its input. A comparison that takes more than its seconds of processor time ends the process: the kernel's
alarm strikes even inside of a power of integers that Python could not leave, and a busy machine changes no verdict.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 4 * 2**30  # no answer needs more; a tower of powers would take the whole machine


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # it warns that it is without a time limit, at every call
    sys.set_int_max_str_digits(0)
    from megatron_sead.grading.comparison import same

    same("x+x", "2x")  # builds the parser's tables, a second's work that counts for no comparison
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # no handler: the alarm ends the process
        try:
            verdict = same(request["reference"], request["given"])
        except Exception:  # sympy raises anything at odd input: what cannot be compared is not the same
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
