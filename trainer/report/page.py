"""The report as one self-contained HTML page: no script, no font, no external picture. Its look is in page.html and
page.css."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from trainer.data.sample import as_html
from trainer.report.charts import Level, Line, line_chart
from trainer.report.content import Report
from trainer.report.rows import checks_of, flat, layer_kinds, tiles_of

_SMALL = (310, 150)
_WORDS = {"pass": "passed", "warn": "passed with warnings", "block": "blocked"}


def render(report: Report) -> str:
    """The page. All text from outside is escaped."""
    gate = report.gate
    served = gate.get("served_as") or {}
    verdict = gate.get("verdict")
    return (
        Environment(autoescape=True)
        .from_string(_file("page.html"))
        .render(
            report=report,
            css=Markup(_file("page.css")),
            verdict=verdict,
            words=_WORDS.get(str(verdict), "not judged"),
            served=" ".join(str(served[key]) for key in ("dtype", "quantize") if served.get(key)),
            base_name=str(report.spec.get("base", "")).rpartition("/")[2],
            tiles=tiles_of(report.result, gate),
            findings=gate.get("findings", []),
            loss_chart=Markup(_loss_chart(report)),
            small_charts=_small_charts(report),
            checks=checks_of(gate) if gate else [],
            kinds=layer_kinds(gate.get("spectrum") or []),
            spectrum_chart=Markup(_spectrum_chart(report)),
            trained_on=[Markup(as_html(runs)) for runs in report.trained_on],
            provenance=flat(report.result.get("provenance", {})),
            spec=flat(report.spec),
        )
    )


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _loss_chart(report: Report) -> str:
    curves = report.curves
    base = (report.result.get("losses") or {}).get("base")
    lines = [Line("training loss", curves.train, "c1"), Line("held-out loss", curves.validation, "c2 dots")]
    levels = [Level("base, held-out", base)] if base is not None else []
    return line_chart("loss", lines, levels=levels, size=(960, 280))


def _small_charts(report: Report) -> list[tuple[str, Markup]]:
    curves = report.curves
    wanted = (
        ("learning rate", curves.learning_rate, "c3"),
        ("gradient norm, before clipping", curves.grad_norm, "c1"),
        ("tokens per second", curves.tokens_per_s, "c2"),
    )
    return [
        (title, Markup(line_chart(title, [Line(title, points, css)], size=_SMALL))) for title, points, css in wanted
    ]


def _spectrum_chart(report: Report) -> str:
    lines = [
        Line(module["name"], list(enumerate(module["singular_values"], start=1)), "c1 thin")
        for module in report.gate.get("spectrum") or []
        if module["singular_values"]
    ]
    return line_chart("singular values", lines, x_label="index", size=(460, 240))
