"""The gate's verdicts on a real base: files that are good, and files that are broken on purpose.

Each case is trained and judged as a job would be, one after another. A good case must not be blocked, a broken one must
not pass. `--only NAME` runs the cases whose names begin with it; the CSV is written after each. `--quick`: the demo's
base and few examples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from adapters_store.base.converted.door import folder_of
from benchmarks.common.report import Report, Row
from benchmarks.train_vs_trl import PRECISIONS
from benchmarks.training.gate_cases import Case, Pair, cases, chat_of
from server.demo.assets import demo_base_path
from server.demo.real import INSTALL, packaged_model
from server.engine.model.base_model import load_base
from server.engine.text.chat_options import ChatOptions
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.process import Precision, gate_run
from server.jobs.gate.serving_scorer import ServingScorer
from trainer.gate.scorer import BASE_ALONE
from trainer.loop import Diverged
from trainer.run import train
from trainer.spec import TrainSpec

EXAMPLES, QUICK_EXAMPLES = 96, 40
ANSWER_TOKENS = 40


def spec_of(case: Case, base: Path, folder: Path, precision: str, *, quick: bool) -> TrainSpec:
    body: dict[str, Any] = {
        "base": base,
        "precision": precision,
        "data": folder / "data.jsonl",
        "validation": folder / "validation.jsonl" if case.validation else None,
        "adapter": {"rank": 8},
        "optim": {"learning_rate": 5e-3 if quick else 1e-3, "epochs": 3},
        "batch": {"examples": 8, "max_sequence_length": 512},
    }
    return TrainSpec.from_mapping({**body, **case.changes})


def own_outputs(base: Path, precision: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The same prompts with the base's greedy answers."""
    scorer, tokenizer = ServingScorer(load_base(base, dtype=precision), None), Tokenizer.load(base)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": prompt}], ChatOptions()) for prompt, _ in pairs]
    ends = tokenizer.chat_end_ids
    found = scorer.generate(prompts, scale=BASE_ALONE, max_new_tokens=ANSWER_TOKENS, eos_ids=ends)
    texts = (tokenizer.decode(ids).strip() or "?" for ids in found)
    return [(prompt, text) for (prompt, _), text in zip(pairs, texts, strict=True)]


def judged(case: Case, base: Path, precision: str, *, quick: bool) -> Row:
    """Train and judge one case."""
    began_s = time.process_time()
    with tempfile.TemporaryDirectory(prefix="multilora-gate-table-") as name:
        folder = Path(name)
        pairs = own_outputs(base, precision, case.pairs) if case.own_outputs else case.pairs
        for file, lines in (("data.jsonl", pairs), ("validation.jsonl", case.validation)):
            (folder / file).write_text("".join(json.dumps(chat_of(pair)) + "\n" for pair in lines))
        try:
            train(spec_of(case, base, folder, precision, quick=quick), folder / "run")
            found = gate_run(folder / "run", Precision(dtype=precision))
            verdict, codes = str(found.verdict), ", ".join(reason.code for reason in found.reasons)
            gain = found.held_out.gain.estimate if found.held_out else None
        except Diverged:
            verdict, codes, gain = "block", "diverged", None
    is_right = verdict != "block" if case.expected == "good" else verdict != "pass"
    return {
        "case": case.name,
        "expected": case.expected,
        "verdict": verdict,
        "is_right": int(is_right),
        "reasons": codes,
        "gain_nats": "" if gain is None else f"{gain:.3f}",
        "cpu_s": round(time.process_time() - began_s, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="cases whose names begin with it; may be repeated"
    )
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of training and gate")
    report = Report.from_arguments("gate_table", __doc__, arguments, parser=parser)
    disable_progress_bar()
    file = None if report.quick else packaged_model()
    if file is None and not report.quick:
        parser.error(f"no real model is installed: {INSTALL}")
    base = demo_base_path() if file is None else folder_of(file)
    rows: list[Row] = []
    for case in cases(QUICK_EXAMPLES if report.quick else EXAMPLES):
        if case.name.startswith(tuple(report.options.only or ("",))):
            rows.append(judged(case, base, report.options.precision, quick=report.quick))
            report.say(" | ".join(str(value) for value in rows[-1].values()))
            report.write_csv(rows)
    wrong = [row for row in rows if not row["is_right"]]
    report.say(f"{len(rows) - len(wrong)} of {len(rows)} verdicts are right; wrong: {[row['case'] for row in wrong]}")


if __name__ == "__main__":
    main()
