"""Runs real clients, each in an environment of its own, against the demo server: python tests/clients/run.py [NAME...]

For each: make the environment (kept for the next run), run its flow in tests/clients/flows, write down versions and
output. Exits 1 where one fails. The only part of the project's tests that installs anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TENANT, AGENTS, TIMEOUT_S = "law", ("desk", "ward"), 300
TORCH = "torch==2.13.0"  # the build pip's index gives is taken; where that has CUDA in it, point pip at one without

# What its checker imports; with all its models, bfcl-eval asks for 31 packages, torch and faiss among them.
BFCL_NEEDS = (
    "openai",
    "tree_sitter==0.21.3",
    "tree-sitter-java==0.21.0",
    "tree-sitter-javascript==0.21.4",
    "filelock",
    "tenacity",
)


@dataclass(frozen=True)
class Client:
    """requirements: installed one after the other. shown: packages whose versions are told."""

    name: str
    requirements: tuple[tuple[str, ...], ...]
    shown: tuple[str, ...]

    @property
    def flow(self) -> Path:
        return HERE / "flows" / f"{self.name.replace('-', '_')}_flow.py"


CLIENTS = (
    Client("openai", (("openai",),), ("openai", "httpx2")),
    Client("anthropic", (("anthropic",),), ("anthropic",)),
    Client("litellm", (("litellm",),), ("litellm", "openai")),
    Client("langchain-openai", (("langchain-openai",),), ("langchain-openai", "langchain-core", "openai")),
    Client("lm-eval", ((TORCH,), ("lm-eval[api]", "transformers")), ("lm_eval", "transformers", "torch")),
    Client("guidellm", ((TORCH,), ("guidellm",)), ("guidellm", "transformers", "torch")),
    Client("llm-comply", (("llm-comply",),), ("llm-comply",)),
    Client("bfcl", (BFCL_NEEDS, ("--no-deps", "bfcl-eval")), ("bfcl-eval", "openai")),
)


@dataclass
class Result:
    client: str
    versions: dict[str, str]
    passed: bool
    seconds: float
    output: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    chosen = [client for client in CLIENTS if client.name in (options.names or [client.name])]
    options.folder.mkdir(parents=True, exist_ok=True)
    pythons = {client.name: _environment(client, options.folder) for client in chosen}
    with _demo(options.folder) as environment:
        results = [_run(client, pythons[client.name], environment) for client in chosen]
    _write(options.folder, results)
    return 0 if all(result.passed for result in results) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*(client.name for client in CLIENTS), []], default=[])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "clients", help="environments and results")
    return parser.parse_args(arguments)


def _environment(client: Client, folder: Path) -> Path:
    """The environment's python; made and filled on a first run."""
    home = folder / client.name
    python, done = home / "bin" / "python", home / "installed"
    wanted = json.dumps(client.requirements)
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"installing {client.name}", flush=True)
    venv.create(home, with_pip=True, clear=True)
    for requirements in client.requirements:
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *requirements]
        subprocess.run(pip, check=True)
    done.write_text(wanted)
    return python


@contextmanager
def _demo(folder: Path) -> Iterator[dict[str, str]]:
    """The demo server for the length of the block; what a flow finds in its environment."""
    command = [str(Path(sys.executable).with_name("multilora")), "demo", "--port", "0", "--json"]
    with (folder / "demo.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the demo did not start; see {log.name}")
            yield _for_flows(json.loads(line))
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def _for_flows(demo: dict[str, Any]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # theirs is their environment
    return {
        **own,
        "CLIENT_URL": f"{demo['url']}/v1",
        "CLIENT_KEY": demo["keys"][TENANT],
        "CLIENT_AGENT_KEYS": json.dumps({tenant: demo["keys"][tenant] for tenant in AGENTS}),
        "CLIENT_MODEL": demo["adapter"],
        "CLIENT_BASE": demo["base"],
        "CLIENT_TOKENIZER": str(ROOT / "server" / "demo" / "assets" / "base"),
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


def _run(client: Client, python: Path, environment: dict[str, str]) -> Result:
    start_s = time.perf_counter()
    try:
        done = subprocess.run(
            [str(python), str(client.flow)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        passed, output = done.returncode == 0, done.stdout if done.returncode == 0 else done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        passed, output = False, f"not over after {TIMEOUT_S} s"
    result = Result(client.name, _versions(client, python), passed, time.perf_counter() - start_s, output.strip())
    print(f"{'passed' if passed else 'FAILED'}  {client.name}  {result.versions}  {result.output[-2000:]}", flush=True)
    return result


def _versions(client: Client, python: Path) -> dict[str, str]:
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    known = {package["name"].replace("_", "-").lower(): package["version"] for package in json.loads(listed.stdout)}
    return {name: known.get(name.replace("_", "-").lower(), "not installed") for name in client.shown}


def _write(folder: Path, results: Sequence[Result]) -> None:
    about = {"python": platform.python_version(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    report = {**about, "clients": [asdict(result) for result in results]}
    path = folder / "results.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{sum(result.passed for result in results)} of {len(results)} clients passed; {path}")


if __name__ == "__main__":
    sys.exit(main())
