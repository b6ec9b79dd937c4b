"""MLflow, by its own client (package mlflow or mlflow-skinny). Its variables say where to: MLFLOW_TRACKING_URI, ...,
and MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from trainer.tracking.tracker import Tracked

EXPERIMENT = "multilora"
MAX_VALUE = 500  # characters of a parameter
_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "paused": "SCHEDULED"}


class MlflowTracker:
    """One MLflow run, which a resumed training continues."""

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self.run_id = run.tracker_id or self._created(run)
        self._client.update_run(self.run_id, status="RUNNING")

    def _created(self, run: Tracked) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run_id: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:MAX_VALUE]) for name, value in run.parameters.items()]
        self._client.log_batch(run_id, params=params)
        return run_id

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id, metrics=[Metric(name, value, now_ms, step) for name, value in values.items()]
        )

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self.run_id, text, f"{name}/step-{step:06d}.md")

    def close(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status=_STATUS[status])
