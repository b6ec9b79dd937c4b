"""Kubernetes' published schema, as its own Python client has it: every model with its fields, types and required ones.

So a manifest is checked without a cluster: unknown fields, wrong types and missing fields are found; what a value means
is not checked.
"""

from __future__ import annotations

from typing import Any

from kubernetes import client
from pydantic import ValidationError


def faults(manifest: dict[str, Any]) -> list[str]:
    """What the API server would refuse of its form; empty for a sound one."""
    version = manifest["apiVersion"].rpartition("/")[2]
    model = getattr(client, f"{version.capitalize()}{manifest['kind']}")
    try:
        model.model_validate(manifest)
    except ValidationError as error:
        return [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return []
