"""Kubernetes' published schema, as its own Python client has it: every model with its fields, types and required ones.

So a manifest is checked without a cluster: unknown fields, wrong types and missing fields are found; what a value means
is not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kubernetes import client

_PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "datetime": str, "object": object}
_KINDS = {"apps/v1": "V1", "v1": "V1", "batch/v1": "V1", "policy/v1": "V1", "networking.k8s.io/v1": "V1"}
_KINDS |= {"autoscaling/v2": "V2", "rbac.authorization.k8s.io/v1": "V1"}


def faults(manifest: dict[str, Any]) -> list[str]:
    """What the API server would refuse of its form; empty for a sound one."""
    name = f"{_KINDS[manifest['apiVersion']]}{manifest['kind']}"
    return list(_faults(manifest, name, manifest["kind"]))


def _faults(value: Any, kind: str, path: str) -> Iterator[str]:
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: must be a list, got {value!r:.60}"
            return
        for index, item in enumerate(value):
            yield from _faults(item, found[1], f"{path}[{index}]")
    elif found := re.fullmatch(r"dict\((.+), (.+)\)", kind):
        for key, item in value.items():
            yield from _faults(item, found[2], f"{path}.{key}")
    elif kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]):  # type: ignore[arg-type]
            yield f"{path}: must be {kind}, got {value!r:.60}"
    elif hasattr(client, kind):
        yield from _model_faults(value, getattr(client, kind), path)


def _model_faults(value: Any, model: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: must be an object, got {value!r:.60}"
        return
    fields = {outside: inside for inside, outside in model.attribute_map.items()}
    yield from (f"{path}.{key}: unknown field" for key in value if key not in fields)
    known = {fields[key]: item for key, item in value.items() if key in fields}
    try:
        model(**known)
    except ValueError as error:
        yield f"{path}: {error}"
    for name, item in known.items():
        if item is not None:
            yield from _faults(item, model.openapi_types[name], f"{path}.{model.attribute_map[name]}")
