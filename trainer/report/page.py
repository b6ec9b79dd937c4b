"""The report as one self-contained HTML page: no script, no font, no external picture. Knows looks."""

from __future__ import annotations

from jinja2 import Environment
from markupsafe import Markup

from trainer.data.sample import as_html
from trainer.report.charts import Level, Line, Size, line_chart
from trainer.report.content import Report
from trainer.report.rows import checks_of, flat, layer_kinds, tiles_of
from trainer.report.style import CSS

_SMALL = Size(width=310, height=150)
_WORDS = {"pass": "passed", "warn": "passed with warnings", "block": "blocked"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}: {{ words }}</title><style>{{ css }}</style></head><body><main>
<header><div><h1>{{ report.title }}</h1>
<p class="soft">{{ report.spec.method }} on {{ base_name }}{% if served %}, judged in {{ served }}{% endif %}</p></div>
<span class="badge {{ verdict or 'none' }}">{{ words }}</span></header>
<div class="tiles">{% for tile in tiles %}<div class="tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span></div>
{% endfor %}</div>
{% if findings %}<section><h2>Reasons against it</h2><ul class="reasons">{% for finding in findings %}
<li class="{{ finding.level }}">{{ finding.message }}</li>{% endfor %}</ul></section>{% endif %}
<section><h2>Training</h2><p class="legend"><span><i style="background:var(--c1)"></i>training loss</span>
<span><i style="background:var(--c2)"></i>held-out loss</span><span>nats per learned token</span></p>
<div class="wide">{{ loss_chart }}</div>
<div class="two" style="margin-top:18px">{% for title, chart in small_charts %}<div><h3>{{ title }}</h3>{{ chart }}
</div>{% endfor %}</div></section>
{% if checks %}<section><h2>Gate</h2><div class="wide"><table><tr><th>check</th><th>measured</th><th>limit</th>
<th></th></tr>{% for check in checks %}<tr><td>{{ check.name }}</td><td>{{ check.measured }}</td>
<td class="soft">{{ check.limit }}</td><td class="{{ check.level }}">{{ check.level }}</td></tr>{% endfor %}
</table></div></section>{% endif %}
{% if report.samples %}<section><h2>Held-out prompts, base and adapter</h2>{% for sample in report.samples %}
<div class="sample"><pre>{{ sample.prompt }}</pre><div class="answers">
<div><h3>base</h3><pre>{{ sample.base }}</pre></div><div><h3>adapter</h3><pre>{{ sample.adapter }}</pre></div>
<div><h3>as in the data</h3><pre>{{ sample.expected }}</pre></div></div></div>{% endfor %}</section>{% endif %}
{% if report.evaluated %}<section><h2>Answers while it trained</h2>{% for sample in report.evaluated %}
<div class="sample"><pre>{{ sample.prompt }}</pre><div class="wide"><table><tr><th class="number">step</th>
<th>answer</th></tr>{% for step, answer in sample.answers %}<tr><td class="number">{{ step }}</td><td>{{ answer }}</td>
</tr>{% endfor %}<tr><td class="soft">data</td><td class="soft">{{ sample.expected }}</td></tr></table></div></div>
{% endfor %}</section>{% endif %}
{% if kinds %}<section><h2>What the adapter changes</h2><div class="two"><div class="wide"><table><tr><th>layers</th>
<th class="number">count</th><th class="number">rank</th><th>effective share of it</th>
<th class="number">update / weight</th></tr>{% for kind in kinds %}<tr><td><code>{{ kind.name }}</code></td>
<td class="number">{{ kind.count }}</td><td class="number">{{ kind.rank }}</td><td><div class="bar">
<i style="width:{{ (kind.used * 100) | round(1) }}%"></i></div></td><td class="number">{{ kind.relative_norm }}</td>
</tr>{% endfor %}</table></div><div><h3>singular values of every layer's update</h3>{{ spectrum_chart }}</div></div>
</section>{% endif %}
{% if trained_on %}<section><h2>What it was trained on</h2><p class="soft">Marked text is learned; the rest is read as
context.</p>{% for text in trained_on %}<pre class="text">{{ text }}</pre>{% endfor %}</section>{% endif %}
<section><h2>Provenance</h2><table>{% for key, value in provenance %}<tr><td class="key">{{ key }}</td>
<td><code>{{ value }}</code></td></tr>{% endfor %}</table></section>
<section><h2>Spec</h2><table>{% for key, value in spec %}<tr><td class="key">{{ key }}</td><td><code>{{ value }}</code>
</td></tr>{% endfor %}</table></section>
</main></body></html>
"""


def render(report: Report) -> str:
    """The page. All text from outside is escaped."""
    gate = report.gate
    served = gate.get("served_as") or {}
    verdict = gate.get("verdict")
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            report=report,
            css=Markup(CSS),
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


def _loss_chart(report: Report) -> str:
    curves = report.curves
    base = (report.result.get("losses") or {}).get("base")
    lines = [Line("training loss", curves.train, "c1"), Line("held-out loss", curves.validation, "c2 dots")]
    levels = [Level("base, held-out", base)] if base is not None else []
    return line_chart("loss", lines, levels=levels, size=Size(width=960, height=280))


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
    return line_chart("singular values", lines, x_label="index", size=Size(width=460, height=240))
