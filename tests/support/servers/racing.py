"""Calls that begin at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def race(calls: Sequence[Callable[[], object]]) -> list[BaseException | None]:
    """What each raised; None where it returned."""
    outcomes: list[BaseException | None] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            calls[index]()
        except BaseException as error:  # noqa: BLE001  the outcome is what is looked at
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
