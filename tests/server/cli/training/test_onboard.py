"""`multilora onboard` and `multilora jobs`, while a worker works on the data directory and while none does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.jobs.store.records import JobStatus
from support.servers.job_world import JobWorld, data_lines

Command = Callable[..., Any]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    def write(lines: bytes | None = None, **behaviour: Any) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(data_lines(**behaviour) if lines is None else lines)
        return path

    return write


def test_onboard_follows_the_job_to_service_and_keeps_no_file(
    world: JobWorld, run: Command, run_json: Command, data: Callable[..., Path]
) -> None:
    world.start_worker()
    told = run_json("onboard", data(), "--tenant", "acme", "--name", "style")
    assert (told["status"], told["fine_tuned_model"]) == ("succeeded", "ft:tiny:acme:style:1")
    shown = run("onboard", data(salt=2), "--tenant", "acme", "--name", "style")
    assert shown.exit_code == 0, shown.output
    assert "in service: style@2 of acme (ft:tiny:acme:style:2)" in shown.output
    assert "Training started" in shown.output
    assert world.onboarding.files.list("acme") == []
    listed = run_json("jobs", "list", "--tenant", "acme")["data"]
    assert [each["multilora"]["version"] for each in listed] == [2, 1]


def test_a_blocked_adapter_exits_4_and_an_operator_may_overrule(
    world: JobWorld, run: Command, run_json: Command, data: Callable[..., Path]
) -> None:
    world.start_worker()
    refused = run("onboard", data(verdict="block"), "--tenant", "acme", "--name", "risky")
    assert refused.exit_code == 4
    assert "gate_blocked: " in refused.output
    (job,) = world.jobs.list("acme")
    told = run_json("jobs", "override", job.id, "--reason", "seen and accepted")
    assert told["multilora"]["override"]["by"].startswith("cli:")
    assert world.wait_ended(job).status is JobStatus.SUCCEEDED
    assert run("jobs", "override", job.id, "--reason", "again").exit_code == 5


def test_bad_data_exits_4_with_the_line_and_leaves_nothing(
    world: JobWorld, run: Command, data: Callable[..., Path]
) -> None:
    lines = data_lines().splitlines(keepends=True)
    path = data(b"".join([lines[0], b"{broken\n", *lines[1:]]))
    refused = run("onboard", path, "--tenant", "acme", "--name", "style", "--json")
    assert refused.exit_code == 4
    error = json.loads(refused.stdout)["error"]
    assert (error["code"], error["param"]) == ("bad_json", "training_file")
    assert "line 2" in error["message"]
    assert (world.jobs.list(), world.onboarding.files.list("acme")) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "spec", "exit_code", "code"),
    [
        (("--tenant", "nobody", "--name", "style"), None, 3, "tenant_not_found"),
        (("--tenant", "acme", "--name", "no spaces"), None, 4, "bad_name"),
        (("--tenant", "acme", "--name", "style"), "adapter: {rank: 999}", 4, "invalid_value"),
        (("--tenant", "acme", "--name", "style"), "[1, 2]", 4, "bad_spec"),
        (("--tenant", "acme", "--name", "style"), "method: full", 4, "unsupported_method"),
        (("--tenant", "acme", "--name", "style"), "seed: 1\nseed: 2", 4, "bad_spec"),
    ],
)
def test_what_cannot_be_onboarded_is_one_line_and_a_code(
    world: JobWorld,
    run: Command,
    data: Callable[..., Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    spec: str | None,
    exit_code: int,
    code: str,
) -> None:
    options = list(arguments)
    if spec is not None:
        (tmp_path / "spec.yaml").write_text(spec)
        options += ["--spec", str(tmp_path / "spec.yaml")]
    refused = run("onboard", data(), *options)
    assert refused.exit_code == exit_code, refused.output
    assert refused.stderr.startswith(f"{code}: ")


def test_a_job_is_paused_resumed_shown_and_cancelled_without_a_worker(
    world: JobWorld, run: Command, run_json: Command
) -> None:
    job = world.create()
    assert run_json("jobs", "pause", job.id)["status"] == "paused"
    assert run_json("jobs", "resume", job.id)["status"] == "validating_files"
    assert run_json("jobs", "cancel", job.id)["status"] == "cancelled"
    shown = run("jobs", "show", job.id).output
    assert "cancelled" in shown
    assert f"Created fine-tuning job: {job.id}" in shown
    assert run("jobs", "resume", job.id).exit_code == 5
    assert run("jobs", "show", "ftjob-none").exit_code == 3
