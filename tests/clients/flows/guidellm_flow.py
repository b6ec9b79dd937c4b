"""guidellm's own benchmark at a fixed concurrency: streams with continuous usage, ignore_eos, exact output lengths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_REQUESTS, NUM_TOKENS = 12, 16


def main(folder: Path) -> None:
    report = folder / "report.json"
    target, key = os.environ["CLIENT_URL"].removesuffix("/v1"), os.environ["CLIENT_KEY"]
    backend = f"kind=openai_http,target={target},model={os.environ['CLIENT_MODEL']},api_key={key}"
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={NUM_TOKENS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={os.environ['CLIENT_TOKENIZER']}"]
    command += ["--output", f"kind=json,path={report}", "--disable-console-interactive"]
    done = subprocess.run(
        command, env={**os.environ, "HF_HOME": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == NUM_REQUESTS, {kind: len(each) for kind, each in requests.items()}
    assert not requests["errored"]
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {NUM_TOKENS}
    print(f"{NUM_REQUESTS} requests at concurrency 4, none failed, {NUM_TOKENS} tokens each")


with tempfile.TemporaryDirectory() as scratch:
    main(Path(scratch))
