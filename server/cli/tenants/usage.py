"""`multilora usage`: tokens used by day, tenant and adapter version. Reads the store; counts nothing itself."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened

DayOption = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="UTC; this day included.")]
_COLUMNS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


def usage(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only this tenant's usage.", metavar="T")] = None,
    start: DayOption = None,
    end: DayOption = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Show the tenants' usage. A running server stores it every second."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        from adapters_store.accounts.usage import counts_to_json, to_json, total_of

        rows = store.usage.rows(tenant=tenant, start=_day(start), end=_day(end))
    total = counts_to_json(total_of(rows))
    shown = to_json(rows)
    output.emit(data=shown, total=total)
    if not rows:
        output.say("no usage yet")
        return
    lines = [[row["day"], row["tenant"], row["adapter"], *(f"{row[name]:,}" for name in _COLUMNS)] for row in shown]
    lines.append(["", "", "total", *(f"{total[name]:,}" for name in _COLUMNS)])
    output.table(("day", "tenant", "adapter", "requests", "prompt", "cached", "completion"), lines)


def _day(value: datetime | None) -> str | None:
    return None if value is None else value.date().isoformat()
