"""A trainer without torch that keeps the trainer's contract: events, control file, checkpoints, resume, result, exits.

`python tiny_trainer.py SPEC --run-dir DIR [--resume]`. The data's first message may tell it how to behave, in JSON:
{"steps": 20, "step_s": 0.01, "fail_at": 5, "fails": 2, "code": "out_of_memory", "exit": 1, "verdict": "block"}.
The adapter is a function of the data alone, so a resumed run makes the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parents[2]
# The product's folders too: tests/ has folders of the same names, which would hide the installed packages.
sys.path += [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels")]

CHECKPOINT_EVERY = 5


class Run:
    def __init__(self, spec: dict[str, Any], run_dir: Path) -> None:
        self.spec, self.dir = spec, run_dir
        self.data = Path(spec["data"]).read_bytes()
        self.behaviour = behaviour_in(self.data)
        self.steps = int(self.behaviour.get("steps", 10))
        self.paused = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.paused = True

    def event(self, kind: str, **fields: Any) -> None:
        with (self.dir / "events.jsonl").open("a") as stream:
            stream.write(json.dumps({"time": time.time(), "type": kind, **fields}) + "\n")

    def end(self, status: str, code: int, **fields: Any) -> int:
        self.event(status, **fields)
        scratch = self.dir / ".result"
        scratch.write_text(json.dumps({"status": status, "tokens": self.steps * 100, **fields}))
        scratch.replace(self.dir / "result.json")
        return code

    def run(self, *, resume: bool) -> int:
        (self.dir / "result.json").unlink(missing_ok=True)
        self.event("stage", stage="training")
        for step in range(self._start(resume), self.steps):
            wish = self._wish()
            if wish:
                self._checkpoint(step)
                (self.dir / "control").unlink(missing_ok=True)
                status, code = {"pause": ("paused", 3), "cancel": ("cancelled", 4)}[wish]
                return self.end(status, code)
            failed = self._fail(step)
            if failed:
                return failed
            time.sleep(float(self.behaviour.get("step_s", 0.01)))
            figures = {"step": step + 1, "num_steps": self.steps, "loss": 2.0 / (step + 1), "learning_rate": 1e-3}
            self.event("step", **figures, tokens=100 * (step + 1), tokens_per_s=1e4, eta_s=0.01)
            if (step + 1) % CHECKPOINT_EVERY == 0:
                self.event("eval", step=step + 1, loss=1.0 / (step + 1), base_loss=3.0)
                self._checkpoint(step + 1)
        self._adapter()
        return self.end("succeeded", 0)

    def _wish(self) -> str:
        control = self.dir / "control"
        word = control.read_text() if control.exists() else ""
        return word or ("pause" if self.paused else "")

    def _start(self, resume: bool) -> int:
        steps = [int(folder.name[5:]) for folder in (self.dir / "checkpoints").glob("step-*")]
        return max(steps, default=0) if resume else 0

    def _checkpoint(self, step: int) -> None:
        (self.dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        self.event("checkpoint", step=step)

    def _fail(self, step: int) -> int:
        """As often as the behaviour says, at its step."""
        told = self.behaviour
        if step != told.get("fail_at"):
            return 0
        count = self.dir / "fails"
        before = int(count.read_text()) if count.exists() else 0
        if before >= told.get("fails", 1):
            return 0
        count.write_text(str(before + 1))
        code = int(told.get("exit", 1))
        if code < 0:
            os.kill(os.getpid(), -code)
        error = {"code": told.get("code", "internal"), "message": "as the test told it", "param": "data"}
        return self.end("failed", code, error=error)

    def _adapter(self) -> None:
        from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base

        seed = int(hashlib.sha256(self.data).hexdigest()[:8], 16)
        folder = self.dir / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_bytes(config_bytes())
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(tiny_base(), seed=seed)))


def behaviour_in(data: bytes) -> dict[str, Any]:
    content = json.loads(data.split(b"\n", 1)[0])["messages"][0]["content"]
    return dict(json.loads(content)) if content.startswith("{") else {}


def main() -> int:
    spec_path, flag, run_dir, *rest = sys.argv[1:]
    assert flag == "--run-dir", sys.argv
    return Run(yaml.safe_load(Path(spec_path).read_text()), Path(run_dir)).run(resume=rest == ["--resume"])


if __name__ == "__main__":
    sys.exit(main())
