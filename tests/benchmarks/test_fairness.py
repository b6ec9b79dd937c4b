"""What fails while the tenants' load is measured ends the measurement: it is no answer, and no refusal."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from benchmarks.common.report import Report
from benchmarks.fairness import CASES, TENANTS, Clients, Length, Seen, row_of, show

LENGTH = Length(seconds=0.3, rounds=1, prompt=2, new=2)
TOKEN = 'data: {"choices": [{"text": "a"}]}\n\n'


def seen_with(status: int, text: str, case: str) -> Seen:
    async def run() -> dict[str, Seen]:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await Clients(client, "base", LENGTH, vocab=10).run(case, {"tenant0": 50.0}, seed=0)

    return asyncio.run(run())["tenant0"]


@pytest.mark.parametrize("case", ["even", "share"])
@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (500, "broken", httpx.HTTPStatusError),
        (200, TOKEN + 'data: {"error": {"message": "broken"}}\n\n', RuntimeError),
    ],
)
def test_a_failure_ends_the_run(status: int, text: str, error: type[Exception], case: str) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        seen_with(status, text, case)
    assert raised.value.subgroup(error) is not None


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_counted(status: int) -> None:
    seen = seen_with(status, "", "even")
    assert seen.refused > 0
    assert seen.ttfts_s == []


def test_a_busy_machine_that_answers_nothing_leaves_a_table_and_a_plot(tmp_path: Path) -> None:
    nothing = {case: [{tenant: Seen() for tenant in TENANTS}] for case in CASES}
    show(Report("fairness", True, tmp_path), [row_of(case, nothing, 1.0) for case in CASES])
    assert (tmp_path / "fairness.png").stat().st_size > 0
