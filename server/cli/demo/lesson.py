"""How a tenant's adapter is learned in front of the user: the job, and its loss drawn as it falls. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from adapters_store.accounts.records import TenantKey
from adapters_store.base.description import AdapterDigest
from adapters_store.store import AdapterStore
from server.cli.common.failures import CommandError
from server.cli.common.output import Output
from server.cli.training.follow import follow
from server.demo.showcase import ADAPTER_NAME, Voice, key_of
from server.jobs.service import Onboarding
from server.jobs.store.job_request import JobRequest
from server.jobs.store.records import Job
from trainer.run_folder.folder import RunFolder

BARS = " ▁▂▃▄▅▆▇█"
HEIGHT = 8  # lines of the curve
MARGIN = 7  # characters of the loss beside it
LINES_APART = 10  # steps between two lines, if nothing can be drawn


class LossScreen:
    """Every step's loss so far. Drawn on a terminal, else a line now and then."""

    def __init__(self, output: Output, live: Live | None, title: str) -> None:
        self._output = output
        self._live = live
        self._title = title
        self._losses: dict[int, float] = {}
        self._said = ""

    def say(self, text: str) -> None:
        """An event of the job."""
        self._said = text
        if self._live is None:
            self._output.say(text, style="dim")
        else:
            self._live.update(self._drawn({}))

    def show(self, job: Job) -> None:
        """Take over the job's last step."""
        progress = dict(job.progress)
        step, loss = progress.get("step"), progress.get("loss")
        if loss is None or step is None or step in self._losses:
            return
        self._losses[step] = loss
        if self._live is not None:
            self._live.update(self._drawn(progress))
        elif step % LINES_APART == 0:
            self._output.say(caption(self._losses, progress))

    def _drawn(self, progress: Mapping[str, Any]) -> RenderableType:
        width = self._output.console.width - MARGIN - 6
        lines: list[RenderableType] = [Text(line, "cyan") for line in curve(list(self._losses.values()), width)]
        below = caption(self._losses, progress) if self._losses else ""
        return Panel(
            Group(*lines, Text(below, "bold"), Text(self._said, "dim", overflow="ellipsis", no_wrap=True)),
            title=self._title,
            title_align="left",
            box=box.ROUNDED,
        )


@contextmanager
def loss_screen(output: Output, title: str) -> Iterator[LossScreen]:
    """Stays on the terminal as it was at the end."""
    if not output.is_live:
        yield LossScreen(output, None, title)
        return
    with Live("", console=output.console, refresh_per_second=4) as live:
        yield LossScreen(output, live, title)


def curve(losses: Sequence[float], width: int) -> list[str]:
    """`losses` as lines of bars from 0 up, the loss at the top and at the bottom beside them.

    More losses than fit are averaged by neighbours; fewer make wider bars.
    """
    if not losses:
        return ["" for _ in range(HEIGHT)]
    width = max(1, width)
    each = max(1, min(4, width // len(losses)))
    at_once = math.ceil(len(losses) / (width // each))
    groups = [losses[start : start + at_once] for start in range(0, len(losses), at_once)]
    values = [sum(group) / len(group) for group in groups]
    top = max(1e-9, *values)
    eighths = [round(value / top * HEIGHT * 8) for value in values]
    lines = []
    for line in range(HEIGHT - 1, -1, -1):
        label = f"{top:6.2f} " if line == HEIGHT - 1 else f"{0:6.2f} " if line == 0 else " " * MARGIN
        lines.append(label + "".join(BARS[max(0, min(8, count - 8 * line))] * each for count in eighths))
    return lines


def caption(losses: Mapping[int, float], progress: Mapping[str, Any]) -> str:
    """Where the training is."""
    step = max(losses)
    total = progress.get("num_steps")
    of_all = f" of {total}" if total else ""
    return f"step {step}{of_all}   loss {losses[step]:.2f}   it began at {losses[min(losses)]:.2f}"


def learned(
    store: AdapterStore,
    onboarding: Onboarding,
    output: Output,
    *,
    tenant: str,
    model: str,
    data: Path,
    general: Path,
    spec: Mapping[str, Any],
) -> Voice:
    """The tenant's adapter, trained from `data` and some of `general`, measured and in service. Raises CommandError if
    the job fails."""
    key: TenantKey = key_of(store, tenant)
    file, mix = (
        onboarding.files.add(tenant=tenant, filename=path.name, purpose="fine-tune", source=path).id
        for path in (data, general)
    )
    request = JobRequest(model=model, training_file=file, mix_file=mix, suffix=ADAPTER_NAME, spec=spec)
    title = f"{tenant} teaches {model} from {data.name}"
    output.say(title, style="bold") if not output.is_live else None
    job = follow(onboarding, onboarding.create(tenant, request), output, lambda out: loss_screen(out, title))
    if job.failure is not None:
        raise CommandError(job.failure.code, f"{job.id}: {job.failure.message}")
    if job.adapter_digest is None:
        raise CommandError("job_not_finished", f"{job.id}: the job is {job.status}")
    _show_verdict(job, output)
    return Voice(tenant, AdapterDigest(job.adapter_digest), key.api_key)


def _show_verdict(job: Job, output: Output) -> None:
    run = RunFolder(job.run_dir)
    losses = run.result()["losses"]
    reasons = "; ".join(str(reason) for reason in (run.verdict() or {}).get("reasons", ()))
    output.say(
        f"gate: {job.verdict}{f' ({reasons})' if reasons else ''}. Loss on examples that it did not see: "
        f"{losses['base']:.2f} -> {losses['best']:.2f}. In service as {job.name}@{job.adapter_version}.",
        style="bold green",
    )
