"""Background work is done in the engine's pauses and nowhere else, and never holds the engine longer than its share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_kernels.background import SHARE, Pace, TimeSlices, UntilAwaited
from support.servers.waiting import wait_until


class Worker:
    """A background thread with endless pieces of work; counts them."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.pieces = 0
        self.is_over = False
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self.pace.work():
            while not self.is_over:
                self.pace.wait()
                self.pieces += 1
                time.sleep(0.0002)


@contextmanager
def working(slices: TimeSlices, pace: Pace | None = None) -> Iterator[Worker]:
    worker = Worker(pace or slices)
    worker.thread.start()
    try:
        yield worker
    finally:
        worker.is_over = True
        slices.lift()
        worker.thread.join(300)
        assert not worker.thread.is_alive()


def pieces_done(worker: Worker) -> int:
    """How many pieces were done, once the worker waits."""
    time.sleep(0.1)
    return worker.pieces


def seconds(act: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def test_work_goes_on_by_itself_while_the_engine_rests() -> None:
    with working(TimeSlices()) as worker:
        before = pieces_done(worker)
        wait_until(lambda: worker.pieces > before)


def test_between_two_gives_no_piece_is_begun() -> None:
    slices = TimeSlices()
    slices.grant()
    with working(slices) as worker:
        assert pieces_done(worker) == 0
        wait_until(lambda: slices.grant() or worker.pieces)  # a busy machine may let the worker come late
        done = pieces_done(worker)
        assert done > 0
        assert pieces_done(worker) == done


def test_a_give_takes_its_share_of_the_step_and_no_more() -> None:
    slices, taken_s = TimeSlices(), []
    slices.grant()
    with working(slices) as worker:
        pieces_done(worker)
        for _ in range(4):
            time.sleep(0.2)
            taken_s.append(seconds(slices.grant))
    assert max(taken_s) >= SHARE * 0.2
    assert min(taken_s) < 0.15


def test_a_give_without_work_takes_no_time() -> None:
    slices = TimeSlices()
    assert min(seconds(lambda: [slices.grant() for _ in range(1000)]) for _ in range(4)) < 0.1


def test_a_give_ends_with_the_work() -> None:
    assert any(seconds_of_a_give_with_one_piece() < SHARE * 0.5 for _ in range(6))


def seconds_of_a_give_with_one_piece() -> float:
    slices = TimeSlices()
    slices.grant()
    time.sleep(0.5)
    done = threading.Event()

    def one_piece() -> None:
        with slices.work():
            done.set()
            slices.wait()

    thread = threading.Thread(target=one_piece)
    thread.start()
    done.wait()
    taken_s = seconds(slices.grant)
    thread.join(300)
    assert not thread.is_alive()
    return taken_s


def test_an_engine_that_rests_lets_waiting_work_go_on() -> None:
    slices = TimeSlices()
    slices.grant()
    with working(slices) as worker:
        assert pieces_done(worker) == 0
        slices.lift()
        wait_until(lambda: worker.pieces > 0)


def test_work_that_something_waits_for_goes_on_without_slices() -> None:
    slices, awaited = TimeSlices(), threading.Event()
    slices.grant()
    with working(slices, UntilAwaited(slices, awaited.is_set)) as worker:
        assert pieces_done(worker) == 0
        awaited.set()
        slices.grant()  # asked after a step: one piece or two are within the slice, the others are not
        wait_until(lambda: worker.pieces > 100)
