"""One run of the demo: a real store, engine and HTTP server; the showcase; then the server stays up. Imports torch."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.cli.common.admin_key import admin_key
from server.cli.common.failures import CommandError
from server.cli.common.listening import url_of
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals
from server.cli.common.store_access import opened
from server.cli.demo.screen import TryIt, headline, show_round, show_try_it
from server.cli.serve.engine_start import remember_base, running_engine
from server.cli.serve.run import http_server
from server.demo.showcase import ADAPTER_NAME, Round, Showcase, ShowcaseFailed, introduce, summary_of
from server.engine.startup.memory_plan import MIB
from server.engine.startup.settings import EngineSettings, MemoryBudget

MEMORY = MemoryBudget(kv_cache=64 * MIB, adapter_pool=32 * MIB, host_cache=64 * MIB)


@dataclass(frozen=True)
class Story:
    """adapters: by tenant, a PEFT folder each. prompts: asked one after the other. note: for people."""

    base: Path
    served_name: str
    adapters: Mapping[str, Path]
    prompts: Sequence[str]
    note: str


def run(
    story: Story, listener: socket.socket, output: Output, signals: StopSignals, *, data_dir: Path | None, once: bool
) -> None:
    """Show the story, then serve until a signal. Raises what `failures` knows, CommandError (demo_failed)."""
    settings = EngineSettings(base=story.base, served_name=story.served_name, memory=MEMORY)
    with (
        _folder(data_dir) as folder,
        opened(folder, output, is_private=True) as store,
        running_engine(settings, store, output) as parts,
    ):
        remember_base(settings, parts, store)
        voices = introduce(store, parts.base.description, story.adapters)
        api = ApiSettings(data_dir=folder, admin_keys=(admin_key(folder).value,))
        app = create_app(engine=parts.worker, store=store, settings=api)
        with background(app), http_server(app, listener, signals) as server:
            rounds = _play(Showcase(parts, voices), story.prompts, output)
            chat = parts.worker.tokenizer.has_chat_template
            url, prompt = url_of(listener), story.prompts[0]
            try_it = TryIt(url, story.served_name, voices, prompt, folder, chat=chat, note=story.note)
            _report(rounds, try_it, output)
            if not once:
                show_try_it(try_it, output)
                signals.wait(while_true=lambda: server.is_alive)


@contextmanager
def _folder(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        yield data_dir
        return
    with TemporaryDirectory(prefix="multilora-demo-") as folder:
        yield Path(folder)


def _play(showcase: Showcase, prompts: Sequence[str], output: Output) -> list[Round]:
    try:
        return [show_round(showcase.ask(prompt), output) for prompt in prompts]
    except ShowcaseFailed as error:
        raise CommandError("demo_failed", str(error)) from error


def _report(rounds: Sequence[Round], try_it: TryIt, output: Output) -> None:
    summary = summary_of(rounds)
    output.say(headline(summary), style="bold")
    output.emit(
        url=try_it.url,
        base=try_it.base,
        adapter=ADAPTER_NAME,
        keys={voice.name: voice.api_key for voice in try_it.voices if voice.api_key is not None},
        rounds=[
            {"prompt": each.prompt, "answers": {name: answer.text for name, answer in each.answers.items()}}
            for each in rounds
        ],
        tokens_per_s=round(summary.tokens_per_s, 1),
        **asdict(summary),
    )
