"""The only module that knows DBOS: named sequences of steps, each step done once, resumed after a crash.

A sequence belongs to an id; started twice it runs once. The jobs database keeps each step's result, so a killed
worker's successor begins at the first step without a result: a step must be safe to run again.

This relies on two facts of DBOS. A killed process's workflows are resumed by the next process that launches under the
same executor id and application version, so both are constants here. Only one process may, so the caller holds a lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dbos import DBOS, DBOSConfig, SetWorkflowID, StepOptions
from dbos import error as dbos_error

logger = logging.getLogger(__name__)

EXECUTOR_ID = "multilora-jobs"
VERSION = "1"  # raise it only if changed steps make half-done sequences impossible to resume
_MAX_RECOVERIES = 10_000  # DBOS parks a workflow after so many restarts of the process
_RETRIES = StepOptions(retries_allowed=True, max_attempts=4, interval_seconds=0.5)  # a database that was busy
_UNDER_WAY = ("PENDING", "ENQUEUED", "DELAYED")

Step = Callable[[str], bool]
Sequences = Mapping[str, Sequence[tuple[str, Step]]]


class DurableSequences:
    """sequences: by name, the named steps in order; a step that returns False ends its sequence.

    failed: called with the subject and the error after a step's last retry. One object in a process.
    """

    def __init__(self, database_url: str, sequences: Sequences, failed: Callable[[str, Exception], None]) -> None:
        self._failed = failed
        config = DBOSConfig(
            name="multilora",
            system_database_url=database_url,
            executor_id=EXECUTOR_ID,
            application_version=VERSION,
            log_level="WARNING",
            enable_otlp=False,
        )
        DBOS(config=config)
        self._workflows = {name: self._workflow(name, steps) for name, steps in sequences.items()}

    def launch(self) -> None:
        """Resume what the last process left, and accept new starts."""
        DBOS.launch()

    def start(self, sequence: str, subject: str, number: int) -> None:
        """Run the sequence for the subject, unless it runs already; `number` counts its deliberate repetitions.

        A sequence that has ended, while its subject has not, begins again at its first step.
        """
        workflow_id = f"{sequence}:{subject}:{number}"
        status = DBOS.get_workflow_status(workflow_id)
        if status is not None:
            if status.status in _UNDER_WAY:
                return  # DBOS has resumed it at launch, or is about to
            DBOS.delete_workflow(workflow_id)
        with SetWorkflowID(workflow_id):
            DBOS.start_workflow(self._workflows[sequence], subject)

    def _workflow(self, name: str, steps: Sequence[tuple[str, Step]]) -> Callable[[str], None]:
        @DBOS.workflow(name=f"multilora.{name}", max_recovery_attempts=_MAX_RECOVERIES)
        def run(subject: str) -> None:
            try:
                for step_name, step in steps:
                    if not DBOS.run_step({"name": step_name, **_RETRIES}, step, subject):
                        return
            except Exception as error:
                logger.exception("%s of %s failed", name, subject)
                DBOS.run_step({"name": "failed"}, self._failed, subject, _cause(error))

        return run


def _cause(error: Exception) -> Exception:
    return error.errors[-1] if isinstance(error, dbos_error.DBOSMaxStepRetriesExceeded) else error


def database_url(data_dir: Path, url: str | None) -> str:
    """The store's own database; beside SQLite another file, since two writers in one would block each other."""
    return f"sqlite:///{data_dir / 'jobs.db'}" if url is None or url.startswith("sqlite") else url
