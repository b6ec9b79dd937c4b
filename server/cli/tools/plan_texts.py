"""Formats plans for people and for programs. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from server.cli.common.output import Output

if TYPE_CHECKING:
    from trainer.planner.hardware import Option
    from trainer.planner.memory import MemoryLine, MemoryNeed
    from trainer.planner.recommend import Recommendation
    from trainer.planner.serving import ServingCase, ServingNeed

GB, GIB = 10**9, 1 << 30


def need_object(need: MemoryNeed) -> dict[str, Any]:
    """A training run's memory on one device."""
    return {
        "model": need.case.shape.name,
        "parameters": need.case.shape.parameters,
        "method": need.case.method,
        "trained_parameters": need.case.trained_parameters,
        "state_bytes": need.state_bytes,
        "total_bytes": need.total,
        "lines": [{"name": line.name, "bytes": line.num_bytes, "how": line.how} for line in need.lines],
    }


def option_object(option: Option) -> dict[str, Any]:
    return {
        "gpu": option.gpu.name,
        "devices": option.devices,
        "checkpointing": option.case.checkpointing,
        "zero_stage": option.case.sharding.stage,
        "total_bytes": option.need.total,
        "hours": option.time.hours,
        "usd": option.time.usd,
        "tokens_per_s": option.time.tokens_per_s,
        "bound": option.time.bound,
    }


def show_need(output: Output, need: MemoryNeed) -> None:
    case = need.case
    sharding = f", ZeRO {case.sharding.stage} on {case.sharding.devices}" if case.sharding.devices > 1 else ""
    title = f"{case.shape.name}, {case.method}, {case.precision}{sharding}: memory of one device"
    rows = [*need.lines]
    table = _memory_table(title, rows)
    table.add_section()
    together = "" if case.accumulates else "the larger of gradients and activations"
    table.add_row(Text("at the peak", "bold"), *_sizes(need.total, "bold"), together)
    states = f"{need.state_bytes / case.shape.parameters:.1f} bytes per parameter of the base"
    table.add_row(Text("of which states", "dim"), *_sizes(need.state_bytes, "dim"), states)
    output.show(table)


def show_options(output: Output, options: list[Option], tokens: int) -> None:
    if not options:
        output.say("this run fits none of these devices, not even eight of one kind with FSDP", style="yellow")
        return
    columns = ("device", "GB of each", "how", "tokens/s", "hours", "USD", "bound by")
    table = _table(
        f"{tokens:,} tokens: the fewest of each device that fit, cheapest first", columns, right=(1, 3, 4, 5)
    )
    for option in options:
        table.add_row(
            f"{option.devices} x {option.gpu.name}",
            f"{option.need.total / GB:.1f} of {option.gpu.memory_bytes / GB:.0f}",
            _how(option),
            f"{option.time.tokens_per_s:,.0f}",
            _short(option.time.hours),
            _short(option.time.usd),
            option.time.bound,
        )
    output.show(table)


def _how(option: Option) -> str:
    ways = [f"FSDP (ZeRO {option.case.sharding.stage})"] if option.devices > 1 else []
    return ", ".join([*ways, *(["checkpointing"] if option.case.checkpointing else [])]) or "as asked"


def show_server(output: Output, case: ServingCase, need: ServingNeed) -> None:
    title = f"{case.shape.name} on a device of {case.device_bytes / GB:.0f} GB"
    table = _memory_table(title, need.lines)
    output.show(table)
    output.say(f"adapters resident at once  {need.adapters_on_device:,}", style="bold")
    output.say(f"adapters in host memory    {need.adapters_in_host:,} ({case.host_bytes / GB:.0f} GB)")
    output.say(f"loading a cold adapter     {1e3 * need.load_s:.1f} ms of copying")


def show_recommendation(output: Output, chosen: Recommendation) -> None:
    show_lines(output, "why", chosen.reasons)
    show_need(output, chosen.need)
    output.say(f"{_short(chosen.time.hours)} hours, USD {_short(chosen.time.usd)}", style="bold")
    output.say()
    output.say("add base and data, and this is a training spec:")
    for line in _yaml(chosen.spec):
        output.say(line, style="cyan")
    output.say()
    show_lines(output, "assumed", chosen.assumptions)


def show_lines(output: Output, heading: str, lines: Iterable[str]) -> None:
    output.say(f"{heading}:", style="dim")
    for line in lines:
        output.say(f"  {line}", style="" if heading == "why" else "dim")


def _yaml(spec: dict[str, Any]) -> list[str]:
    import yaml

    return str(yaml.safe_dump(spec, sort_keys=False)).rstrip().split("\n")


def _memory_table(title: str, lines: Iterable[MemoryLine]) -> Table:
    table = _table(title, ("what", "GB", "GiB", "how it is counted"), right=(1, 2))
    for line in lines:
        if line.num_bytes:
            table.add_row(line.name, *_sizes(line.num_bytes), line.how)
    return table


def _sizes(count: int, style: str = "") -> tuple[Text, Text]:
    return Text(f"{count / GB:,.2f}", style), Text(f"{count / GIB:,.2f}", style)


def _table(title: str, columns: Iterable[str], *, right: Iterable[int]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
