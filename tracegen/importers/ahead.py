"""Work ahead: one thread reads and parses while another writes. Polars, zstd and the unpackers let go of the GIL."""

import queue
import threading
from collections.abc import Generator
from typing import TypeVar

Item = TypeVar("Item")
DEPTH = 1  # items that wait, beside the one that is made and the one that is used


def ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items, made in a thread of their own; what raises there raises here, and closing ends the thread."""
    ready: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(DEPTH)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                ready.put((True, item))
                if stopped.is_set():
                    return
            ready.put((False, None))
        except BaseException as error:  # noqa: BLE001 - raised where the items are used
            ready.put((False, error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue
        thread.join()
