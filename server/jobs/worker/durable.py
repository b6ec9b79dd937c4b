"""The one place that knows DBOS: named sequences of steps, each step done once, gone on with after any death.

A sequence belongs to an id; started twice it runs once. What a step returned is kept in the jobs database, so a killed
worker's successor begins at the first step whose end nobody wrote down: a step must bear being done again.

DBOS facts this stands on: a killed process's workflows are taken up by whoever launches under the same executor id and
application version, so both are constants here; only one process may, so the caller holds a lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dbos import DBOS, DBOSConfig, SetWorkflowID, StepOptions
from dbos import error as dbos_error

logger = logging.getLogger(__name__)

EXECUTOR_ID = "multilora-jobs"
VERSION = "1"  # rises only where a sequence's steps change so that half-done ones cannot be gone on with
_MAX_RECOVERIES = 10_000  # DBOS parks a workflow after so many restarts of the process
_RETRIES = StepOptions(retries_allowed=True, max_attempts=4, interval_seconds=0.5)  # a database that was busy
_UNDER_WAY = ("PENDING", "ENQUEUED", "DELAYED")

Step = Callable[[str], bool]
Sequences = Mapping[str, Sequence[tuple[str, Step]]]


class DurableSequences:
    """sequences: by name, the named steps in order; a step that returns False ends its sequence.

    failed: told the subject and the error where a step raised, again and again. One object in a process.
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
        """Take up what the last process left, and from now on what is started."""
        DBOS.launch()

    def start(self, sequence: str, subject: str, number: int) -> None:
        """Run the sequence for the subject; `number` counts its deliberate repetitions. Nothing where it runs already.

        One that has ended, though its subject says it has not, is begun again at its first step.
        """
        workflow_id = f"{sequence}:{subject}:{number}"
        status = DBOS.get_workflow_status(workflow_id)
        if status is not None:
            if status.status in _UNDER_WAY:
                return  # DBOS has taken it up at launch, or does so in a moment
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
    """The store's own database, or beside SQLite's file another: two writers there would wait for each other."""
    return f"sqlite:///{data_dir / 'jobs.db'}" if url is None or url.startswith("sqlite") else url
