"""The manifests for replicas, against Kubernetes' published schema, and against what our server knows and needs."""

from __future__ import annotations

import copy
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cli.serve.http_server import DRAIN_S
from server.cli.serve.settings import SERVE_SETTINGS
from server.jobs.tasks.kubernetes_jobs import check_template
from support.kubernetes_schema import faults

ROOT = Path(__file__).parents[2]
FLEET = ROOT / "deploy" / "kubernetes" / "fleet"
KUSTOMIZATION = yaml.safe_load((FLEET / "kustomization.yaml").read_text())
FOREIGN = ("InferencePool", "HTTPRoute")  # not Kubernetes' own: their fields are checked by name below


def manifests() -> list[dict[str, Any]]:
    files = [*KUSTOMIZATION["resources"], "job-template.yaml"]
    return [part for name in files for part in yaml.safe_load_all((FLEET / name).read_text())]


def one(kind: str) -> dict[str, Any]:
    [found] = [each for each in manifests() if each["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = one("Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("kind", [each["kind"] for each in manifests() if each["kind"] not in FOREIGN])
def test_kubernetes_own_schema_knows_every_field(kind: str) -> None:
    assert faults(one(kind)) == []


def test_the_check_finds_what_an_api_server_would_refuse() -> None:
    broken = copy.deepcopy(one("Deployment"))
    broken["spec"]["template"]["spec"]["containers"][0]["imagePull"] = "x"
    broken["spec"]["replicas"] = "two"
    del broken["spec"]["selector"]
    assert len(faults(broken)) == 3, faults(broken)


def test_a_replica_has_no_claim_of_its_own_and_only_the_run_folder_is_shared() -> None:
    volumes = {each["name"]: each for each in pod()["volumes"]}
    assert "emptyDir" in volumes["data"]
    claims = {
        each["persistentVolumeClaim"]["claimName"] for each in volumes.values() if "persistentVolumeClaim" in each
    }
    assert claims == {"multilora-runs", "multilora-base"}
    assert "StatefulSet" not in {each["kind"] for each in manifests()}


def test_no_replica_is_killed_while_it_drains() -> None:
    container = pod()["containers"][0]
    assert (
        pod()["terminationGracePeriodSeconds"] > int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + DRAIN_S
    )
    assert one("Deployment")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_every_option_and_variable_is_the_servers() -> None:
    container = pod()["containers"][0]
    options = {each.option: each for each in SERVE_SETTINGS.values()}
    given = {name: value for name, value in pairwise(container["args"]) if name.startswith("--")}
    for name, value in given.items():
        options[name].check(int(value) if value.isdigit() else value)
    known = {name for each in SERVE_SETTINGS.values() for name in each.environment}
    known |= {"MULTILORA_ADMIN_KEY", "MULTILORA_BLOB_URL"}
    assert {each["name"] for each in container["env"] if each["name"].startswith("MULTILORA_")} <= known


@pytest.mark.parametrize("page", ["deploy/Dockerfile", "deploy/kubernetes/fleet/kustomization.yaml", "docs/scaling.md"])
def test_the_image_of_the_pods_has_what_they_are_told_to_use(page: str) -> None:
    """PostgreSQL, an object store and Kubernetes' client are extras that the image lacks by default."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    built = [set(extras.split(",")) for extras in re.findall(r"EXTRAS=([a-z0-9,]*[a-z0-9])", (ROOT / page).read_text())]
    assert any({"postgres", "s3", "kubernetes"} <= extras <= known.keys() for extras in built), built


def test_secrets_are_references() -> None:
    assert all("value" not in each for each in pod()["containers"][0]["env"])


def test_everything_selects_the_pods() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [one(kind)["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget", "InferencePool")]
    assert all(each["matchLabels"].items() <= labels.items() for each in selectors)
    assert one("Service")["spec"]["selector"].items() <= labels.items()
    assert one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    target = one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", one("Deployment")["metadata"]["name"])


def test_the_pool_has_the_fields_of_version_1() -> None:
    """inference.networking.k8s.io/v1: selector, 1 to 8 ports, and a picker with its port; nothing of the alpha's."""
    pool = one("InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    spec = pool["spec"]
    assert set(spec) == {"selector", "targetPorts", "endpointPickerRef"}
    assert [each["number"] for each in spec["targetPorts"]] == [pod()["containers"][0]["ports"][0]["containerPort"]]
    picker = spec["endpointPickerRef"]
    assert set(picker) == {"name", "port", "failureMode"}
    assert picker["failureMode"] in ("FailOpen", "FailClose")
    assert isinstance(picker["port"]["number"], int)
    [backend] = one("HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])


def test_the_picker_scores_by_what_we_report() -> None:
    values = yaml.safe_load((FLEET / "llm-d-values.yaml").read_text())["router"]
    config = yaml.safe_load(values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]])
    [profile] = config["schedulingProfiles"]
    declared = {each["type"] for each in config["plugins"]}
    assert {each["pluginRef"] for each in profile["plugins"]} == declared
    weights = {each["pluginRef"]: each.get("weight") for each in profile["plugins"]}
    assert weights["lora-affinity-scorer"] == 3
    assert values["modelServers"]["matchLabels"] == one("InferencePool")["spec"]["selector"]["matchLabels"]


def test_the_worker_may_do_what_its_executor_does_and_no_more() -> None:
    rules = {
        (group, what): set(rule["verbs"])
        for rule in one("Role")["rules"]
        for group in rule["apiGroups"]
        for what in rule["resources"]
    }
    assert rules == {
        ("batch", "jobs"): {"create", "get", "delete"},
        ("batch", "jobs/status"): {"get"},
        ("", "pods"): {"list"},
    }
    assert pod()["serviceAccountName"] == one("ServiceAccount")["metadata"]["name"]


def test_the_template_of_trainings_is_one_that_the_worker_takes_and_mounts_what_it_needs() -> None:
    template = yaml.safe_load((FLEET / "job-template.yaml").read_text())
    check_template(template)
    mounts = {
        each["name"]: each["mountPath"]
        for each in template["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    servers = {each["name"]: each["mountPath"] for each in pod()["containers"][0]["volumeMounts"]}
    assert {name: servers[name] for name in ("runs", "base")} == {name: mounts[name] for name in ("runs", "base")}
    assert KUSTOMIZATION["configMapGenerator"][0]["files"] == ["job-template.yaml"]
