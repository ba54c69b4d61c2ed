"""An iterator that is one item ahead of its consumer, in a thread: reading and writing at the same time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items. One is being made and one waits while the caller works on a third.

    What `items` raises is raised here. When the caller stops early, the thread ends after the item that it is at.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def make() -> None:
        try:
            for item in items:
                ready.put((item,))
                if stopped.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (box := ready.get()) is not None:
            if isinstance(box, BaseException):
                raise box
            yield box[0]
            del box  # or it would be kept while the next is waited for
    finally:
        stopped.set()
        with suppress(queue.Empty):  # the thread may wait for a free place
            ready.get_nowait()
        thread.join()
