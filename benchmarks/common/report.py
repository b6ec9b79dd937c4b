"""How every benchmark is called and what it leaves: arguments, progress lines, a CSV, a plot and a short table."""

from __future__ import annotations

import argparse
import csv
import math
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import hardware, machine_columns
from benchmarks.common.timing import Spread

Row = dict[str, object]  # one line of results
DEFAULT_OUT = Path("benchmarks/results")
COLOURS = ("#2f6fb0", "#d1722a", "#4d9a5b", "#8a5fa8", "#777777", "#b5483d")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Report:
    """One benchmark's run. quick: the smallest sizes that still go end to end; its numbers mean nothing. options: all
    that the command line gave."""

    name: str
    quick: bool
    out: Path
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    _console: Console = field(default_factory=lambda: Console(highlight=False, width=160))
    _began_s: float = field(default_factory=time.monotonic)

    @classmethod
    def from_arguments(
        cls,
        name: str,
        about: str | None,
        arguments: Sequence[str] | None = None,
        *,
        parser: argparse.ArgumentParser | None = None,
    ) -> Report:
        """Read `[--quick] [--out DIR]`, and the options that `parser` has already."""
        parser = parser or argparse.ArgumentParser()
        parser.prog, parser.description = f"python -m benchmarks.{name}", about
        parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that it runs, not a measurement")
        parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where CSV and plot go")
        parsed = parser.parse_args(arguments)
        parsed.out.mkdir(parents=True, exist_ok=True)
        report = cls(name, parsed.quick, parsed.out, parsed)
        report.say(f"{name} on {hardware()}" + (" (--quick: numbers mean nothing)" if parsed.quick else ""))
        return report

    def say(self, text: str) -> None:
        """One line of progress."""
        self._console.print(f"[dim]{time.monotonic() - self._began_s:6.1f} s[/dim]  {text}")

    def write_csv(self, rows: Sequence[Mapping[str, object]]) -> None:
        """One row per case; every row also says on which machine, with how many threads, when."""
        path = self.out / f"{self.name}.csv"
        machine = machine_columns() | ({"quick": True} if self.quick else {})
        columns = dict.fromkeys([*(key for row in rows for key in row), *machine])
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(columns))
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in {**row, **machine}.items()} for row in rows)
        self.say(f"wrote {path}")

    def figure(self, title: str, *, panels: int = 1, width_in: float = 3.4) -> tuple[Figure, list[Axes]]:
        """A row of panels under a title that says what was found."""
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(max(4.6, width_in * panels), 3.4))
        axes = figure.subplots(1, panels, squeeze=False)[0]
        figure.suptitle(textwrap.fill(title, int(11.5 * figure.get_figwidth())), x=0.01, ha="left", fontsize=11)
        figure.supxlabel(hardware(), x=0.99, ha="right", fontsize=5, color="#888888")
        return figure, list(axes)

    def save_plot(self, figure: Figure) -> None:
        for axes in figure.axes:
            if axes.get_yscale() == "log" and not math.isfinite(axes.dataLim.minposy):  # nothing was measured
                axes.set_yscale("linear")
        path = self.out / f"{self.name}.png"
        figure.savefig(path)
        self.say(f"wrote {path}")

    def print_table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left", header_style="bold")
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def print_rows(self, title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
        """columns: header -> format of its cell, as "{us:.0f}"."""
        self.print_table(title, list(columns), [[form.format(**row) for form in columns.values()] for row in rows])


def ranged(column: str, digits: int = 2) -> str:
    """Format of a Spread's cell: median and extremes."""
    median, low, high = (f"{{{name}:.{digits}f}}" for name in (column, f"{column}_min", f"{column}_max"))
    return f"{median} ({low}..{high})"


def number(value: object) -> float:
    """A numeric cell of a row of results."""
    assert isinstance(value, int | float), f"{value!r} is not a number"
    return float(value)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def spread(row: Row, column: str) -> Spread:
    """The inverse of Spread.columns."""
    return Spread(number(row[column]), number(row[f"{column}_min"]), number(row[f"{column}_max"]))


def bars(axes: Axes, labels: Sequence[str], series: Mapping[str, Sequence[Spread]], *, first_colour: int = 0) -> None:
    """Groups of bars, one bar per series, each with its median above it; whiskers span the rounds' extremes.

    first_colour: how many colours other panels use, if one legend serves them all.
    """
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [group + width * (index - (len(series) - 1) / 2) for group in range(len(values))]
        heights = [value.median for value in values]
        errors = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
        whiskers = {"elinewidth": 0.8, "ecolor": "#333333"}
        axes.bar(
            places,
            heights,
            0.92 * width,
            yerr=errors,
            capsize=2,
            error_kw=whiskers,
            color=COLOURS[first_colour + index],
            label=name,
        )
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                _short(value.median), (place, value.high), (0, 2), textcoords="offset points", ha="center", fontsize=6
            )
    axes.set_xticks(range(len(labels)), labels)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2f}"


def target_line(axes: Axes, value: float, label: str) -> None:
    """A dashed line at a figure to reach."""
    axes.axhline(value, color="#444444", linewidth=0.9, linestyle="--", label=label)


def legend_below(figure: Figure) -> None:
    """One legend for all panels, under them."""
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=len(entries), fontsize=8)
