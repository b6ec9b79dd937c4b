"""Tenants onboarded one after the other through HTTP while the server answers others without a pause.

Starts `multilora serve` on the demo's base, keeps clients asking, and takes each tenant from a file to the first token
of its own model with OpenAI's routes alone. Prints, per tenant, what took how long, and what the others saw meanwhile.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.machine import machine_columns
from benchmarks.common.timing import percentile
from benchmarks.serving.demo_server import ADMIN_KEY, MemoryMib, auth, demo_server
from server.demo.assets import BASE_NAME
from server.demo.recipe.corpus import tenant_dialogues, write_jsonl
from server.demo.recipe.styles import TENANTS

RESULTS = Path(__file__).parent / "results" / "onboarding.csv"
QUESTION = [{"role": "user", "content": "What should I avoid when I sign a contract?"}]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """tenants: onboarded in sequence. dialogues: lines of each one's file. clients: who ask meanwhile."""

    tenants: int = 40
    dialogues: int = 300
    max_steps: int = 30
    clients: int = 2


QUICK_SCALE = Scale(tenants=1, dialogues=40, max_steps=6, clients=1)


@dataclass
class Load:
    """What those who ask meanwhile see. ttfts_s: to the first streamed token, seconds."""

    ttfts_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def asking(url: str, key: str, count: int) -> Iterator[Load]:
    """Clients who stream short answers of the base, one after the other."""
    load, stopping = Load(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, headers=auth(key), timeout=60) as client:
            while not stopping.is_set():
                try:
                    load.ttfts_s.append(first_token_s(client, BASE_NAME))
                except (httpx.HTTPError, RuntimeError) as error:
                    load.failures.append(str(error))

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
    """Stream an answer to its end; seconds to its first token. Raises RuntimeError where there is none."""
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


def onboard(url: str, name: str, data: Path, scale: Scale) -> dict[str, Any]:
    """One tenant from a file to the first token of its model."""
    with httpx.Client(base_url=url, timeout=60) as admin:
        made = admin.post("/admin/tenants", json={"name": name}, headers=auth(ADMIN_KEY)).raise_for_status()
    start_s = time.perf_counter()
    with httpx.Client(base_url=url, headers=auth(made.json()["api_key"]), timeout=60) as client:
        files = {"file": (data.name, data.read_bytes())}
        file = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()
        asked = {"model": BASE_NAME, "training_file": file["id"], "suffix": "style"}
        asked["multilora"] = {"rank": 8, "learning_rate": 5e-3, "max_steps": scale.max_steps}
        job = client.post("/v1/fine_tuning/jobs", json=asked).raise_for_status().json()
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(0.2)
            job = client.get(f"/v1/fine_tuning/jobs/{job['id']}").raise_for_status().json()
        job_s = time.perf_counter() - start_s
        row = {"tenant": name, "status": job["status"], "verdict": job["multilora"]["verdict"], "job_s": job_s}
        if job["status"] == "succeeded":
            first_token_s(client, job["fine_tuned_model"])
        return {**row, "file_to_token_s": time.perf_counter() - start_s, "error": (job["error"] or {}).get("message")}


def run(scale: Scale, scratch: Path) -> tuple[list[dict[str, Any]], Load, float]:
    """Every tenant's row, what others saw, and the wall time."""
    with demo_server(scratch / "data", MemoryMib()) as server:
        url = server.url
        watcher = httpx.post(f"{url}/admin/tenants", json={"name": "watcher"}, headers=auth(ADMIN_KEY)).json()
        with asking(url, watcher["api_key"], scale.clients) as load:
            rows, start_s = [], time.perf_counter()
            for index in range(scale.tenants):
                data = scratch / f"{index}.jsonl"
                write_jsonl(tenant_dialogues(TENANTS[index % len(TENANTS)], scale.dialogues, seed=index), data)
                rows.append(onboard(url, f"tenant{index}", data, scale))
                print(json.dumps(rows[-1]), flush=True)
            return rows, load, time.perf_counter() - start_s


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    scale = QUICK_SCALE if "--quick" in given else Scale()
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as scratch:
        rows, load, wall_s = run(scale, Path(scratch))
    failed = [row for row in rows if row["status"] != "succeeded"]
    seconds = [row["file_to_token_s"] for row in rows]
    ttfts_ms = [1e3 * ttft for ttft in load.ttfts_s]
    print(f"{len(rows)} tenants in {wall_s:.0f} s, {len(failed)} failed; file to first token ", end="")
    print(f"median {percentile(seconds, 50):.1f} s, longest {max(seconds):.1f} s")
    print(f"meanwhile {len(ttfts_ms)} answers to others, {len(load.failures)} failed; time to first token ", end="")
    print(", ".join(f"p{each} {percentile(ttfts_ms, each):.0f} ms" for each in (50, 95, 99)))
    if scale is not QUICK_SCALE:
        _write(rows)
    if failed or load.failures:
        sys.exit(f"failed: {[row['error'] for row in failed]} {load.failures[:3]}")


def _write(rows: Sequence[dict[str, Any]]) -> None:
    columns = [{**row, **machine_columns()} for row in rows]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns[0]))
        writer.writeheader()
        writer.writerows(columns)


if __name__ == "__main__":
    main()
