"""The page needs nothing from elsewhere, escapes what strangers wrote, and shows what was measured, nothing else."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from support.trainers.training_data import write_jsonl
from trainer.data.sample import Run
from trainer.report.charts import Level, Line, line_chart, nice_ticks, short
from trainer.report.content import Report, Sample, collect, curves_of
from trainer.report.page import render
from trainer.report.rows import bytes_text, checks_of, duration_text, flat, layer_kinds, tiles_of

INTERVAL = {"estimate": 0.5, "low": 0.4, "high": 0.6, "confidence": 0.95, "num_examples": 30}
EVIL = "<script>alert('x')</script>"
VOID = {"meta", "line", "circle", "polyline", "br"}


def gate(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "verdict": "warn",
        "reasons": ["it forgets"],
        "findings": [{"code": "forgets", "level": "warn", "message": "it forgets", "value": 0.2, "limit": 0.1}],
        "held_out": {
            "base_loss": 2.0,
            "adapter_loss": 1.5,
            "gain": INTERVAL,
            "prompt_use": None,
            "sweep": {"1": 1.5, "0.7": None},
            "best_scale": 1.0,
            "scale_gain": None,
        },
        "general": {"source": "mix", "base_loss": 3.0, "adapter_loss": 3.2, "rise": INTERVAL, "base_knows_it": True},
        "round_trip": {"precision": "float32", "difference": 1e-6, "limit": 1e-4, "unit": "largest", "num_prompts": 4},
        "spectrum": [
            {
                "name": f"model.layers.{layer}.{name}",
                "rank": 8,
                "scale": 2.0,
                "singular_values": [3.0, 1.0, 0.5],
                "effective_rank": 4.0,
                "norm": 3.2,
                "relative_norm": 0.1 + layer,
            }
            for layer in range(2)
            for name in ("q_proj", "v_proj")
        ],
        "thresholds": {
            "sweep_gain": 0.01,
            "general_warn": 0.1,
            "general_block": 0.3,
            "relative_norm_warn": 1.0,
            "relative_norm_block": 10.0,
            "collapse_share": 0.1,
        },
        "served_as": {"dtype": "bfloat16", "quantize": "nf4", "device": "cpu"},
    }
    return {**body, **changes}


def run_folder(path: Path) -> Path:
    path.mkdir()
    steps = [
        {
            "time": 1.0,
            "type": "step",
            "step": n,
            "loss": 3.0 / n,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 5e3,
        }
        for n in range(1, 40)
    ]
    again = {**steps[5], "loss": 9.0}
    null = {**steps[5], "step": 40, "loss": None}
    evals = [{"time": 1.0, "type": "eval", "step": n, "loss": 2.0 - n / 40} for n in (0, 20, 40)]
    write_jsonl(path / "events.jsonl", [{"time": 0, "type": "stage", "stage": "data"}, *steps, again, null, *evals])
    result = {
        "status": "succeeded",
        "losses": {"base": 2.0},
        "tokens_per_s": 6123.4,
        "peak_bytes": 5 << 30,
        "wall_s": 3700,
        "num_trained_parameters": 108544,
        "provenance": {"data_digest": "sha256:abc", "mix_digest": None, "versions": {"torch": "2.13"}},
    }
    (path / "result.json").write_text(json.dumps(result))
    return path


def report_of(tmp_path: Path, body: dict[str, Any]) -> Report:
    return collect(
        run_folder(tmp_path / EVIL.replace("/", "")),
        spec={"method": "lora", "base": "/models/tiny", "adapter": {"rank": 8}},
        gate=body,
        samples=[Sample(EVIL, "expected", f"base {EVIL}", "adapter")],
        trained_on=[[Run("question ", 0.0, 2), Run(EVIL, 1.0, 3)]],
    )


class Page(HTMLParser):
    """Collects tags, text, and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_needs_nothing_else_and_escapes_strangers(tmp_path: Path) -> None:
    text = render(report_of(tmp_path, gate()))
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert not page.seen & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    words = " ".join(" ".join(Page(render(report_of(tmp_path, gate()))).words).split())
    for said in (
        "passed with warnings",
        "lora on tiny, judged in bfloat16 nf4",
        "2.00 → 1.50",
        "+0.500",
        "95% from 0.4 to 0.6",
        "6,123",
        "5 GiB",
        "1 h 1 min",
        "108,544",
        "it forgets",
        "not measured: too few prompts",
        "sha256:abc",
        "versions.torch",
        "adapter.rank",
        EVIL,
    ):
        assert said in words, said


@pytest.mark.parametrize("body", [{}, gate(held_out=None, general=None, round_trip=None, spectrum=[])])
def test_a_run_that_was_hardly_measured_has_a_page_all_the_same(tmp_path: Path, body: dict[str, Any]) -> None:
    (tmp_path / "empty").mkdir()
    report = collect(tmp_path / "empty", spec={"method": "lora", "base": "b"}, gate=body)
    words = " ".join(Page(render(report)).words)
    assert "nothing was recorded" in words
    assert ("not judged" in words) == (not body)
    json.dumps(report.to_mapping(), allow_nan=False)


def test_curves_take_the_last_word_on_a_step_and_leave_out_what_is_not_a_number(tmp_path: Path) -> None:
    curves = report_of(tmp_path, gate()).curves
    assert [step for step, _ in curves.train] == list(range(1, 40))
    assert dict(curves.train)[6] == 9.0
    assert curves.validation == [(0, 2.0), (20, 1.5), (40, 1.0)]
    assert curves_of([]).train == []


def test_every_finding_marks_its_check() -> None:
    levels = {check.name: check.level for check in checks_of(gate())}
    assert levels.pop("rise on general text (mix)") == "warn"
    assert levels.pop("uses its prompts: the cost of a wrong prompt") == "skipped"
    assert set(levels.values()) == {"ok"}
    finding = {"code": "worse_than_base", "level": "block", "message": "worse"}
    assert checks_of(gate(findings=[finding]))[0].level == "block"
    alike = gate(findings=[{"code": "one_answer", "level": "warn", "message": "the same"}])
    alike["held_out"]["num_alike_answers"] = 9
    assert checks_of(alike)[1].level == "warn"
    assert "all 9 answers are the same" in checks_of(alike)[1].measured


def test_layers_are_grouped_by_their_last_name() -> None:
    kinds = layer_kinds(gate()["spectrum"])
    assert [(kind.name, kind.count, kind.rank, kind.used, kind.relative_norm) for kind in kinds] == [
        ("q_proj", 2, "8", 0.5, "1.1"),
        ("v_proj", 2, "8", 0.5, "1.1"),
    ]


def test_figures_read_well() -> None:
    assert [bytes_text(count) for count in (512, 2048, 3 << 20, 5 << 30)] == ["512 B", "2 KiB", "3 MiB", "5 GiB"]
    assert [duration_text(s) for s in (4.23, 200, 3700)] == ["4.2 s", "3 min 20 s", "1 h 1 min"]
    assert [short(v) for v in (0, 1500, 0.0002, 0.25, 2e6)] == ["0", "1.5k", "2e-4", "0.25", "2M"]
    assert flat({"a": {"b": 1, "c": None}, "d": [1, 2]}) == [("a.b", "1"), ("d", "1, 2")]
    assert tiles_of({}, {}) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 12), (1e-5, 2e-4), (3, 3), (0, 0), (7, 50_000)])
def test_ticks_are_round_few_and_span_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in itertools.pairwise(ticks)}
    assert steps == {1.0}


def test_a_chart_keeps_its_ends_within_its_frame_and_draws_levels() -> None:
    points = [(n, 5.0 / n) for n in range(1, 5000)]
    svg = ET.fromstring(line_chart("loss & co", [Line("a", points)], levels=[Level("base", 2.0)]))
    (curve,) = [item for item in svg if item.tag == "polyline"]
    places = [tuple(map(float, place.split(","))) for place in curve.attrib["points"].split()]
    assert len(places) <= 320
    assert places[-1][0] == pytest.approx(640 - 14, abs=0.2)
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in places)
    assert [item.attrib["class"] for item in svg if item.tag == "line"].count("level") == 1
    assert "nothing was recorded" in line_chart("loss", [Line("a", [])])


def test_a_gate_in_int8_shows_what_int8_costs() -> None:
    limits = {**gate()["thresholds"], "int8_change": 0.01}
    found = checks_of(gate(int8={"loss": 2.0, "int8_loss": 2.004, "change": 0.004}, thresholds=limits))
    (row,) = [check for check in found if "int8" in check.name]
    assert (row.measured, row.limit, row.level) == ("+0.004 nats", "at most 0.01 nats", "ok")
