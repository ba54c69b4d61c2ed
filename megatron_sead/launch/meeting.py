"""While nodes wait for each other, before any rank is there: who is waited for, and a Ctrl-C that ends the wait."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time

from megatron_sead.wording import counted

INTERVAL = 15.0  # seconds between two lines


def tell_who_is_waited_for(place: str, node: int, nodes: int) -> None:
    """Start a thread that does, until torchrun has met the other nodes; from then on it handles signals itself.

    torchrun waits in code that is not Python's, where no handler of Python's can run: the thread is told of a signal
    through a pipe. Call it in the main thread.

    Args:
        place: "address:port" where the nodes meet, which node 0 opens.
        node: this one's number, from 0.
    """
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _leave)
    who = (
        f"the {counted(nodes - 1, 'other node')} at {place}"
        if node == 0
        else f"node 0 at {place}, and the others there"
    )
    threading.Thread(target=_tell, args=(receiving, who), name="meeting", daemon=True).start()


def _leave(*_: object) -> None:
    os._exit(0)


def _tell(receiving: int, who: str) -> None:
    began = told = time.monotonic()
    while signal.getsignal(signal.SIGINT) is _leave:
        ready, _, _ = select.select([receiving], [], [], min(0.5, INTERVAL))
        if ready and signal.SIGINT in os.read(receiving, 64):
            os._exit(0)
        if time.monotonic() - told >= INTERVAL:
            told = time.monotonic()
            print(f"waiting for {who}: {told - began:.0f} s so far; Ctrl-C ends it", file=sys.stderr, flush=True)
