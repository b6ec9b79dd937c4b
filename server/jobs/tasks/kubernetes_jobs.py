"""Runs tasks as Kubernetes Jobs made of an operator's template. Needs `multilora[kubernetes]`, and a shared run folder.

The template is a Job manifest: image, volumes, resources, node selector, queue (`kueue.x-k8s.io/queue-name`). Set here
are its name, labels, the command and variables of its first container, and `backoffLimit: 0`, because the training step
counts attempts. NAME.kubernetes in the run folder holds the Job's name, written before the Job is created; a worker
that is killed in between creates the same one, and the API server refuses a second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from adapters_store.filesystem import Filesystem
from adapters_store.parsing.strict_yaml import load_yaml
from server.jobs.settings import KUBERNETES
from server.jobs.tasks.executor import ExecutorUnavailable, Task, TaskState

_GONE, _CONFLICT, _TOO_MANY = 404, 409, 429
_TIMEOUT_S = 30
_LABELS = "app.kubernetes.io/managed-by", "multilora.io/run", "multilora.io/task"


class TemplateRefused(ValueError):
    """The manifest cannot be what trainings are made of."""


class KubernetesJobExecutor:
    """template: a Job manifest. api: of a cluster; the pod's own service account or kubeconfig by default."""

    kind, is_remote = KUBERNETES, True

    def __init__(self, template: Mapping[str, Any], api: client.ApiClient | None = None) -> None:
        check_template(template)
        self._template = template
        self._namespace = str(template["metadata"].get("namespace", "default"))
        self._jobs = client.BatchV1Api(api)
        self._pods = client.CoreV1Api(api)

    @classmethod
    def from_file(cls, path: Path) -> KubernetesJobExecutor:
        """Raises TemplateRefused, OSError, and the client's ConfigException: there is no cluster to talk to."""
        try:
            template = load_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TemplateRefused(f"{path}: {' '.join(str(error).split())}") from error
        config.load_config()
        return cls(template)

    def start(self, task: Task) -> None:
        """Raises ApiException (the API server refuses the Job), OSError, and as `state`."""
        if self.state(task).is_running:
            return
        known = task.remembered(KUBERNETES)
        name = known if known is not None and self._job(known) is None else f"multilora-{uuid4().hex[:20]}"
        Filesystem().write_atomic(task.file(KUBERNETES), name.encode())
        body = manifest(self._template, task, name)
        with _reached(_CONFLICT, may_refuse=True):
            self._jobs.create_namespaced_job(self._namespace, body, _request_timeout=_TIMEOUT_S)

    def state(self, task: Task) -> TaskState:
        """Raises ExecutorUnavailable."""
        name = task.remembered(KUBERNETES)
        job = None if name is None else self._job(name)
        if name is None or job is None:
            return TaskState(is_running=False)
        conditions = (job.status and job.status.conditions) or ()
        ended = {each.type for each in conditions if each.status == "True"} & {"Complete", "Failed"}
        if not ended:
            return TaskState(is_running=True)
        return TaskState(is_running=False, exit_code=0 if "Complete" in ended else self._exit_code(name))

    def stop(self, task: Task) -> None:
        """Its pod gets SIGTERM, then its own grace period."""
        self._delete(task)

    def kill(self, task: Task) -> None:
        self._delete(task, grace_period_seconds=0)

    def _delete(self, task: Task, **options: int) -> None:
        name = task.remembered(KUBERNETES)
        if name is None:
            return
        options["_request_timeout"] = _TIMEOUT_S
        with _reached(_GONE, may_refuse=True):
            self._jobs.delete_namespaced_job(name, self._namespace, propagation_policy="Foreground", **options)

    def _job(self, name: str) -> Any:
        """None: there is no such Job."""
        found = None
        with _reached(_GONE):
            found = self._jobs.read_namespaced_job_status(name, self._namespace, _request_timeout=_TIMEOUT_S)
        return found  # noqa: RET504  (the block may have ended before it was there)

    def _exit_code(self, name: str) -> int | None:
        """Of the container that runs the command, negative for a signal; None if the pod is gone. A pod's statuses are
        sorted by name, so another container's may come first."""
        own = self._template["spec"]["template"]["spec"]["containers"][0].get("name")
        selector = {"label_selector": f"batch.kubernetes.io/job-name={name}", "_request_timeout": _TIMEOUT_S}
        pods = []
        with _reached(_GONE):
            pods = self._pods.list_namespaced_pod(self._namespace, **selector).items
        codes = [
            each.state.terminated.exit_code
            for pod in pods
            for each in pod.status.container_statuses or ()
            if each.name == own and each.state is not None and each.state.terminated is not None
        ]
        code = int(codes[0]) if codes else None
        return 128 - code if code is not None and code > 128 else code


def check_template(template: Any) -> None:
    """Raises TemplateRefused with the field."""
    if not isinstance(template, Mapping) or (template.get("apiVersion"), template.get("kind")) != ("batch/v1", "Job"):
        raise TemplateRefused("the template must be one batch/v1 Job")
    pod = ((template.get("spec") or {}).get("template") or {}).get("spec") or {}
    if not isinstance(template.get("metadata"), Mapping):
        raise TemplateRefused("the template needs metadata")
    if not pod.get("containers"):
        raise TemplateRefused("spec.template.spec.containers must have at least 1 container")
    if pod.get("restartPolicy") != "Never":
        raise TemplateRefused(f"spec.template.spec.restartPolicy must be Never, got {pod.get('restartPolicy')!r}")


def manifest(template: Mapping[str, Any], task: Task, name: str) -> dict[str, Any]:
    """The Job of one task."""
    body: dict[str, Any] = copy.deepcopy(dict(template))
    labels = dict(zip(_LABELS, ("multilora", task.folder.name, task.name), strict=True))
    pod = body["spec"]["template"]
    for metadata in (body["metadata"], pod.setdefault("metadata", {})):
        metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    body["metadata"]["name"] = name
    body["spec"]["backoffLimit"] = 0
    container = pod["spec"]["containers"][0]
    container["command"], container["args"] = [*task.on_one_node], []
    own = [{"name": key, "value": value} for key, value in task.environment.items()]
    container["env"] = [*(each for each in container.get("env") or () if each["name"] not in task.environment), *own]
    return body


@contextmanager
def _reached(expected: int, *, may_refuse: bool = False) -> Iterator[None]:
    """ExecutorUnavailable if the API server cannot be reached, or cannot do it now. expected: an answer's status that
    ends the block without an error. may_refuse: any other 4xx but 429 is a refusal, and stays an ApiException."""
    try:
        yield
    except HTTPError as error:
        raise ExecutorUnavailable(f"Kubernetes: {error}") from error
    except ApiException as error:
        status = error.status or 0
        if status == expected:
            return
        if may_refuse and 400 <= status < 500 and status != _TOO_MANY:
            raise
        raise ExecutorUnavailable(f"Kubernetes: {error.status} {error.reason}") from error
