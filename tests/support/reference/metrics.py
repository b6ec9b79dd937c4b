"""Every metric that a server with a real engine shows: name, type, labels, help."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.api.app import create_app
from server.api.settings import ApiSettings
from support.reference.table import table
from support.servers.service import make_base, running

OF_HISTOGRAMS = {"le"}


def section() -> str:
    families = [family for family in _families() if not family.name.endswith("_created")]
    rows = [_row(family) for family in sorted(families, key=lambda family: family.name)]
    return table(("metric", "type", "labels", "meaning"), rows)


def _families() -> list[Metric]:
    """Those of a server that has answered one completion, so that labelled counters have a sample."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running(make_base(folder / "tiny"), {}, folder / "data") as service:
            settings = ApiSettings(data_dir=folder / "data", auth="off")
            with TestClient(create_app(engine=service.worker, store=service.store, settings=settings)) as client:
                asked = {"model": service.worker.served_name, "prompt": [1, 2, 3], "max_tokens": 4}
                assert client.post("/v1/completions", json=asked).status_code == 200
                return list(text_string_to_metric_families(client.get("/metrics").text))


def _row(family: Metric) -> tuple[str, str, str, str]:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = sorted({label for sample in family.samples for label in sample.labels} - OF_HISTOGRAMS)
    meaning = re.sub(r"\s+", " ", family.documentation).strip()
    return f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), meaning
