"""A run that another framework starts on a thread: signals are the process's, the control file is the run's."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from trainer.run_folder.control import SIGNALS, Control
from trainer.run_folder.folder import PAUSE, RunFolder


def test_off_the_main_thread_the_file_counts_and_the_process_keeps_its_signals(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[object] = []

    def run() -> None:
        folder = RunFolder(tmp_path)
        with Control(folder) as control:
            found.append([signal.getsignal(number) for number in SIGNALS] == before)
            found.append(control.requested())
            folder.request(PAUSE)
            found.append(control.requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True, "", PAUSE]
