"""The output of a command: lines and tables for people, one JSON object per line for programs. Decides no content."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160  # if stdout is no terminal: wide enough to keep ids and paths in one line


class Output:
    """Made once per command. Output for people is off with --json, output for programs is off without it.

    with_events: programs also get the events on the way to the answer.
    """

    def __init__(self, *, as_json: bool = False, with_events: bool = False) -> None:
        self.as_json = as_json
        self._with_events = with_events
        self.console = _console(sys.stdout)

    @property
    def is_live(self) -> bool:
        """Whether something may move on the screen."""
        return self.console.is_terminal and not self.as_json

    def emit(self, **fields: Any) -> None:
        """For programs: one object in one line."""
        if self.as_json:
            print(json.dumps(fields), flush=True)

    def event(self, kind: str, **fields: Any) -> None:
        """For programs, if this command has events."""
        if self._with_events:
            self.emit(event=kind, **fields)

    def say(self, text: str = "", *, style: str = "") -> None:
        """For people: one line as it is, never cut or wrapped, so that it can be pasted."""
        if not self.as_json:
            self.console.print(Text(text, style=style), soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """For people: a table or a panel."""
        if not self.as_json:
            self.console.print(renderable)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
        """For people: texts in columns; long ones are folded, not cut."""
        table = Table()
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        self.show(table)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A stage that takes a while: a line at its start, or a spinner and the duration at its end."""
        self.event("stage", stage=text)
        start_s = time.perf_counter()
        if not self.is_live:
            self.say(text)
        with self.waiting(text):
            yield
        if self.is_live:
            self.say(f"{text} ({time.perf_counter() - start_s:.1f} s)", style="dim")

    def waiting(self, text: str) -> Any:
        """A spinner while the block runs, on a terminal only; it disappears at the end."""
        return self.console.status(Text(text)) if self.is_live else nullcontext()


def complain(line: str) -> None:
    """One red line on stderr."""
    _console(sys.stderr).print(Text(line, style="red"), soft_wrap=True)


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=PLAIN_WIDTH)
