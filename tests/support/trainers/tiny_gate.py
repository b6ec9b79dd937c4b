"""A gate without a model: gives the verdict that the data holds ({"verdict": "block"}), else "pass".

With {"samples": [[prompt, expected, base, adapter]]} it leaves a report that holds
them, and a page beside it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[2]
# The product's folders too: tests/ has folders of the same names, which would hide the installed packages.
sys.path += [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels")]


def main() -> None:
    from support.trainers.tiny_trainer import behaviour_in

    run_dir = Path(sys.argv[1])
    told = behaviour_in((run_dir / "training.jsonl").read_bytes())
    time.sleep(float(told.get("gate_s", 0.0)))
    verdict = told.get("verdict", "pass")
    if verdict == "crash":
        sys.exit("the gate crashed, as the test told it")
    gate = {"verdict": verdict, "reasons": [] if verdict == "pass" else ["worse than base"]}
    if "samples" in told:
        from trainer.report.content import Sample, collect

        report = collect(run_dir, spec={}, gate=gate, samples=[Sample(*texts) for texts in told["samples"]])
        (run_dir / "report.json").write_text(json.dumps(report.to_mapping()))
        (run_dir / "report.html").write_text("<p>The report of this run.</p>")
    scratch = run_dir / ".gate"
    scratch.write_text(json.dumps(gate))
    scratch.replace(run_dir / "gate.json")


if __name__ == "__main__":
    main()
