"""What signals do to a command, on real signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from server.cli.common.stop_signals import STOPPING, StopSignals


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_the_block_quietly(number: signal.Signals) -> None:
    is_done = False
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        time.sleep(5)
        is_done = True
    assert signals.asked
    assert not is_done


def test_a_signal_ends_the_wait() -> None:
    with StopSignals() as signals:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        signals.wait()
        assert signals.asked


def test_the_wait_ends_with_what_it_waits_for() -> None:
    answers = iter([True, True, False])
    with StopSignals() as signals:
        signals.wait(while_true=lambda: next(answers))
        assert not signals.asked


def test_a_deferred_signal_only_counts() -> None:
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.count == 2


def test_other_errors_pass_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with pytest.raises(ZeroDivisionError):
        _fail_inside(before)
    assert [signal.getsignal(number) for number in STOPPING] == before


def _fail_inside(before: list[Any]) -> float:
    with StopSignals():
        assert [signal.getsignal(number) for number in STOPPING] != before
        return 1 / 0
