"""What a server does for jobs, without the rest of it: a process that supervises a worker. Killed, its worker ends too.

`python job_server.py DATA_DIR [WORKER OPTIONS...]`; MULTILORA_DATABASE_URL names a database outside it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from server.jobs.service import Onboarding
from server.jobs.worker.options import DATABASE_URL_VARIABLE
from server.jobs.worker.supervisor import SupervisorSettings, WorkerSupervisor


def main() -> None:
    data_dir, *options = sys.argv[1:]
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    settings = SupervisorSettings(options=tuple(options), look_s=0.05, waits_s=(0.0, 0.05))
    onboarding = Onboarding.open(Path(data_dir), database_url=os.environ.get(DATABASE_URL_VARIABLE))
    supervisor = WorkerSupervisor(onboarding, settings)
    supervisor.start()
    ending.wait()
    supervisor.stop()


if __name__ == "__main__":
    main()
