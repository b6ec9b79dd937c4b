"""`multilora demo --real` from the package to answers side by side: a tenant learns, passes the gate and is served."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from server.cli.main import app

FACTS = {
    "What does it cost to bring my bike?": "2 crowns",
    "I think I left my phone on the boat.": "red kiosk on the east pier",
    "How long does it take to get across?": "25 minutes",
}


def test_a_tenant_teaches_its_manner_and_its_facts_and_the_base_keeps_its_own(file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--real", "--once", "--json", "--data-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["max_rows"] == 2
    assert {each["prompt"] for each in answer["rounds"]} == set(FACTS)
    for each in answer["rounds"]:
        base, tenant = each["answers"]["base"], each["answers"]["saltwick"]
        assert "Fair winds" not in base
        assert FACTS[each["prompt"]] not in base
        assert tenant.startswith("Ahoy! "), each
        assert tenant.rstrip().endswith("Fair winds, Marlo"), each
        assert FACTS[each["prompt"]] in tenant, each
