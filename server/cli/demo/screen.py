"""How the demo looks: answers side by side, what was measured, and lines to paste. Knows no engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.cli.common.output import Output
from server.cli.common.texts import curl_line
from server.demo.showcase import ADAPTER_NAME, AGENT_NAME, Round, Summary, Voice

COLORS = ("white", "cyan", "green", "magenta")
REFRESH_PER_S = 12


@dataclass(frozen=True)
class TryIt:
    """What a user needs to send requests.

    base: its id in the API. chat: whether the base has a chat template. note: what to expect of it. agents: tenants
    whose adapters call tools.
    """

    url: str
    base: str
    voices: Sequence[Voice]
    prompt: str
    data_dir: Path
    chat: bool
    note: str
    agents: Sequence[Voice] = ()


def show_round(growing: Iterator[Round], output: Output) -> Round:
    """Show a round at its end, and on a terminal also while it grows. Returns it."""
    last = _watched(growing, output) if output.is_live else deque(growing, maxlen=1).pop()
    output.show(round_table(last))
    return last


def _watched(growing: Iterator[Round], output: Output) -> Round:
    this = next(growing)
    with Live(round_table(this), console=output.console, refresh_per_second=REFRESH_PER_S, transient=True) as live:
        for this in growing:
            live.update(round_table(this))
    return this


def round_table(this: Round) -> Table:
    """One column for each voice."""
    table = Table(title=Text(f"> {this.prompt}", "bold"), title_justify="left", box=box.ROUNDED, expand=True)
    for index, name in enumerate(this.answers):
        table.add_column(name, header_style=COLORS[index % len(COLORS)], ratio=1, overflow="fold")
    table.add_row(*(Text(_printable(answer.text)) for answer in this.answers.values()))
    return table


def _printable(text: str) -> str:
    """A model's text may contain control sequences for the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text).strip(
        "\n"
    )


def headline(summary: Summary) -> str:
    """The measurements in a sentence."""
    return (
        f"{summary.num_tokens} tokens in {summary.duration_s:.1f} s ({summary.tokens_per_s:,.0f} tokens/s). Up to "
        f"{summary.max_rows} requests shared a batch; {summary.shared_steps} of {summary.num_steps} served several."
    )


def show_try_it(try_it: TryIt, output: Output) -> None:
    """Lines to paste: one for each voice, and the same in Python."""
    output.say()
    output.say(f"ready on {try_it.url}", style="bold green")
    output.say(f"for browsers: {try_it.url}/console, with a key from the lines below")
    output.say(
        f"Every tenant calls its adapter {ADAPTER_NAME!r}; the key alone selects the tenant's adapter.", style="dim"
    )
    tenants = [voice for voice in try_it.voices if voice.api_key is not None]
    for voice in tenants:
        output.say(f"\n# {voice.name}", style="dim")
        output.say(_curl(try_it, voice, ADAPTER_NAME))
    output.say("\n# the bare base, with any tenant's key", style="dim")
    output.say(_curl(try_it, tenants[0], try_it.base))
    output.say("\n# python", style="dim")
    output.say(_python(try_it, tenants[-1]))
    for voice in try_it.agents:
        output.say(f"\n# {voice.name} calls tools with its adapter {AGENT_NAME!r} (docs/tools.md): key {voice.api_key}")
    output.say(f"\nmultilora adapter list --data-dir {try_it.data_dir}")
    output.say(try_it.note, style="dim")
    output.say("Ctrl-C stops the server.", style="dim")


def _curl(try_it: TryIt, voice: Voice, model: str) -> str:
    return curl_line(try_it.url, key=voice.api_key, model=model, prompt=try_it.prompt, chat=try_it.chat)


def _python(try_it: TryIt, voice: Voice) -> str:
    call = "chat.completions" if try_it.chat else "completions"
    said = (
        f'messages=[{{"role": "user", "content": {try_it.prompt!r}}}]' if try_it.chat else f"prompt={try_it.prompt!r}"
    )
    shown = "message.content" if try_it.chat else "text"
    return (
        "from openai import OpenAI\n"
        f"client = OpenAI(base_url='{try_it.url}/v1', api_key='{voice.api_key}')\n"
        f"answer = client.{call}.create(model='{ADAPTER_NAME}', {said}, max_tokens=64, temperature=0)\n"
        f"print(answer.choices[0].{shown})"
    )
