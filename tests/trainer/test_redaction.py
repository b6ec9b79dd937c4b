"""Reports and job messages name files, never the machine's folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.jobs.store.records import JobFailure, JobStatus
from support.servers.job_world import JobWorld
from trainer.redaction import redact_folders
from trainer.report.content import collect
from trainer.report.page import render


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("/srv/bases/llama", "llama"),
        ("No such file: '/srv/data/runs/ftjob-1/request.yaml'", "No such file: 'request.yaml'"),
        ("/a/b/c.jsonl and /d/e/", "c.jsonl and "),
        ("(/a/b)", "(b)"),
        ("and/or 3/4, tokens/s, a relative/path/kept", "and/or 3/4, tokens/s, a relative/path/kept"),
        ("https://example.org/a/b and org/model", "https://example.org/a/b and org/model"),
        ("/v1", "/v1"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(told: str, shown: str) -> None:
    assert redact_folders(told) == shown
    assert redact_folders({"x": [told, {"y": told}], "n": 1.5, "t": (None, told)}) == {
        "x": [shown, {"y": shown}],
        "n": 1.5,
        "t": [None, shown],
    }


def test_a_report_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    """Spec and result of a job hold absolute paths, and a tenant reads the report."""
    run_dir = tmp_path / "ftjob-1"
    run_dir.mkdir()
    (run_dir / "events.jsonl").write_text("")
    (run_dir / "result.json").write_text(json.dumps({"error": {"message": f"{run_dir}/adapter is not whole"}}))
    spec = {"method": "lora", "base": f"{tmp_path}/bases/tiny", "data": {"path": f"{run_dir}/training.jsonl"}}
    judged = collect(run_dir, spec=spec, gate={"verdict": "block", "reasons": [f"{run_dir}/x is gone"]})
    for text in (json.dumps(judged.to_mapping()), render(collect(run_dir, spec=spec, gate={}))):
        assert str(tmp_path) not in text
        assert "training.jsonl" in text
        assert "tiny" in text


def test_a_job_that_failed_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    world = JobWorld(tmp_path)
    job = world.create()
    world.jobs.note(job, "x", f"{world.data_dir}/runs/x was looked at")
    world.jobs.end(job, JobStatus.FAILED, JobFailure("internal_error", f"OSError: {world.data_dir}/runs/y"))
    texts = [*world.messages(job), world.jobs.get(job.id).failure.message]  # type: ignore[union-attr]
    assert [text for text in texts if str(tmp_path) in text] == []
    assert texts[-1] == "OSError: y"
    world.close()
