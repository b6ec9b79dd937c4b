"""What deploy/ asks for exists: metrics, routes, options, folders; and nobody is given less time than a drain takes."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from server.api.app import create_app
from server.api.settings import ApiSettings
from server.cli.main import app
from server.cli.serve.http_server import DRAIN_S
from support.servers.live_server import serving
from support.servers.service import make_base, running

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "multilora.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
ALERT_TESTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFEST = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "multilora.yaml").read_text()))
UNIT = (DEPLOY / "systemd" / "multilora.service").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a real engine."""
    folder = tmp_path_factory.mktemp("deploy")
    with running(make_base(folder / "tiny"), {}, folder / "data") as service:
        settings = ApiSettings(data_dir=folder / "data", auth="off")
        with serving(create_app(engine=service.worker, store=service.store, settings=settings)) as url:
            yield url


@pytest.fixture(scope="module")
def metrics(url: str) -> set[str]:
    """Every name that a query may use."""
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", httpx.get(f"{url}/metrics").text, flags=re.MULTILINE):
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return panels + [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def named_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:multilora_|process_|vllm:)\w+", query))


def test_every_metric_that_dashboard_and_alerts_ask_for_exists(metrics: set[str]) -> None:
    asked = {name for query in queries() for name in named_in(query)}
    assert len(asked) >= 25
    assert asked - metrics == set()


def test_every_metric_the_docs_name_exists(metrics: set[str]) -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics}
    named = set(re.findall(r"`((?:multilora_|vllm:|process_)\w+)`", page))
    assert named - families == set()


def test_no_metric_is_told_twice(url: str) -> None:
    """Scrapers refuse a second family of a name, or add the two up."""
    told = re.findall(r"^# TYPE (\S+)", httpx.get(f"{url}/metrics").text, flags=re.MULTILINE)
    assert [name for name in set(told) if told.count(name) > 1] == []


def test_what_alerts_wait_for_by_its_code_is_counted_from_zero(url: str) -> None:
    """A counter that begins at its first failure has not risen: the alert would miss it, and it may be the only one."""
    codes = {code for query in queries() for code in re.findall(r'code="(\w+)"', query)}
    assert len(codes) >= 2
    text = httpx.get(f"{url}/metrics").text
    assert [code for code in codes if f'multilora_failures_total{{code="{code}"}} 0.0' not in text] == []


def test_every_alert_is_seen_to_fire_and_to_keep_quiet() -> None:
    alerts = {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
    asked = [case for test in ALERT_TESTS["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in asked if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in asked if not case.get("exp_alerts")} == alerts


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_prometheus_agrees(url: str, tmp_path: Path) -> None:
    """Its own checks of what is scraped, asked for and configured, and the alerts' tests."""
    folder, panels = DEPLOY / "prometheus", tmp_path / "panels.yml"
    rules = [
        {"record": f"panel:{index}", "expr": re.sub(r"\$__rate_interval", "1m", query)}
        for index, query in enumerate(queries())
    ]
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for words, text in (
        (["check", "metrics"], httpx.get(f"{url}/metrics").text),
        (["check", "rules", "--lint=none", str(panels)], None),
        (["check", "config", str(folder / "prometheus.yml")], None),
        (["test", "rules", str(folder / "alerts_test.yml")], None),
    ):
        done = subprocess.run(["promtool", *words], input=text, text=True, capture_output=True, check=False)
        assert done.returncode in (0, 3), (
            words,
            done.stdout,
            done.stderr,
        )  # 3: it would have named something otherwise


def test_queries_close_what_they_open() -> None:
    for query in queries():
        for pair in ("()", "[]", "{}"):
            assert query.count(pair[0]) == query.count(pair[1]), query
        assert re.search(r"rate\(\w+\{[^}]*\}\[|rate\(\w+\[", query) or "rate(" not in query, query


def test_dashboard_panels_do_not_lie_on_each_other() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_an_alert_says_how_bad_it_is_and_what_happened() -> None:
    for rule in (rule for group in ALERTS["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def container() -> dict[str, Any]:
    [stateful] = [part for part in MANIFEST if part["kind"] == "StatefulSet"]
    spec: dict[str, Any] = stateful["spec"]["template"]["spec"]
    return {**spec["containers"][0], "grace_s": spec["terminationGracePeriodSeconds"]}


def test_probes_ask_routes_that_answer(url: str) -> None:
    paths = {container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    paths |= set(re.findall(r"http://127\.0\.0\.1:8000(/\w+)", DOCKERFILE))
    assert paths == {"/health", "/ready"}
    assert {httpx.get(url + path).status_code for path in paths} == {200}


def test_no_server_is_killed_while_it_drains() -> None:
    pre_stop_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert container()["grace_s"] > pre_stop_s + DRAIN_S
    assert int(COMPOSE["services"]["multilora"]["stop_grace_period"].rstrip("s")) > DRAIN_S
    stop = re.search(r"TimeoutStopSec=(\d+)", UNIT)
    assert stop is not None
    assert int(stop[1]) > DRAIN_S


def test_only_named_pods_reach_the_server_and_it_has_no_token_of_the_cluster() -> None:
    [policy] = [part["spec"] for part in MANIFEST if part["kind"] == "NetworkPolicy"]
    [stateful] = [part["spec"] for part in MANIFEST if part["kind"] == "StatefulSet"]
    pod = stateful["template"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        assert rule["from"], "a rule without `from` lets everyone in"
        assert all(next(iter(peer.values())).get("matchLabels") for peer in rule["from"])
        assert [port["port"] for port in rule["ports"]] == [container()["ports"][0]["name"]]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["enableServiceLinks"] is False, "links would set MULTILORA_PORT to a URL"


def test_every_image_is_pinned() -> None:
    images = [container()["image"], *(each["image"] for each in COMPOSE["services"].values() if "image" in each)]
    for image in images:
        tag = image.partition("@")[2] or image.rpartition(":")[2]
        assert re.search(r"\d", tag), f"{image} moves"


def test_the_unit_bounds_memory_and_tasks() -> None:
    for name in ("MemoryMax", "TasksMax", "LimitNOFILE"):
        assert re.search(rf"^{name}=\d+%?$", UNIT, re.MULTILINE), name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze comes with systemd")
def test_systemd_agrees(tmp_path: Path) -> None:
    unit = tmp_path / "multilora.service"
    unit.write_text(UNIT.replace("/opt/multilora/bin/multilora", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_that_is_given_exists() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    start = re.search(r"ExecStart=\S+ (.+)", UNIT)
    assert start is not None
    for words in (container()["args"], COMPOSE["services"]["multilora"]["command"], start[1].split()):
        assert words[0] == "serve"
        for option in (word for word in words if str(word).startswith("--")):
            assert option in shown


def test_what_is_copied_and_mounted_exists() -> None:
    sources = [
        word for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    mounts = [each for service in COMPOSE["services"].values() for each in service.get("volumes", ())]
    files = [mount.partition(":")[0] for mount in mounts if mount.startswith("./")]
    assert files
    assert [name for name in files if not (DEPLOY / name).exists()] == []


def test_what_the_image_is_built_of_is_not_ignored() -> None:
    kept = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    }
    assert copied == kept


def test_the_folder_of_the_c_kernels_may_hold_programs() -> None:
    """Docker mounts a tmpfs noexec unless it is told otherwise."""
    [home] = [mount for mount in COMPOSE["services"]["multilora"]["tmpfs"] if mount.startswith("/home/multilora")]
    assert "exec" in home.partition(":")[2].split(",")


def test_the_image_has_every_package_of_the_distribution() -> None:
    """A folder that is forgotten in the Dockerfile would be missed at import only."""
    listed = re.search(r"^include = \[(.+)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None
    for package in re.findall(r'"(\w+)\*"', listed[1]):
        folder = "kernels" if package == "lora_kernels" else package
        assert f"COPY {folder} " in inspect.cleandoc(DOCKERFILE)
