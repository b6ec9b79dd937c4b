"""One run of the demo: a real store, engine and HTTP server; the showcase; then the server stays up. Imports torch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.cli.common.admin_key import admin_key
from server.cli.common.base_path import find_base
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.listening import url_of
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals
from server.cli.common.store_access import opened
from server.cli.demo.lesson import learned
from server.cli.demo.screen import TryIt, headline, show_round, show_try_it
from server.cli.serve.engine_start import remember_base, running_engine
from server.cli.serve.run import http_server
from server.demo import assets, real
from server.demo.showcase import (
    ADAPTER_NAME,
    AGENT_NAME,
    BASE,
    Round,
    Showcase,
    ShowcaseFailed,
    Voice,
    introduce,
    published,
    summary_of,
)
from server.engine.startup.build import EngineParts
from server.engine.startup.settings import MIB, EngineSettings, MemoryBudget
from server.jobs.service import Onboarding

MEMORY = MemoryBudget(kv_cache=64 * MIB, adapter_pool=32 * MIB, host_cache=64 * MIB)
REAL_MEMORY = MemoryBudget(kv_cache=256 * MIB, adapter_pool=64 * MIB, host_cache=64 * MIB)
NUM_PROMPTS = 3  # as many as one screen shows


@dataclass(frozen=True)
class Story:
    """What is shown. bring: makes the voices, once the base is there; agents: those that call tools. prompts: asked in
    turn. note: for people."""

    base: Path
    served_name: str
    bring: Callable[[Stage], list[Voice]]
    prompts: Sequence[str]
    note: str
    memory: MemoryBudget = MEMORY
    agents: Callable[[Stage], list[Voice]] = lambda _: []
    dtype: str = "auto"


@dataclass(frozen=True)
class Stage:
    """What exists before the first request."""

    folder: Path
    store: AdapterStore
    parts: EngineParts
    output: Output


def run(
    story: Story, listener: socket.socket, output: Output, signals: StopSignals, *, data_dir: Path | None, once: bool
) -> None:
    """Show the story, then serve until a signal. Raises what `failures` knows, CommandError (demo_failed)."""
    settings = EngineSettings(base=story.base, served_name=story.served_name, dtype=story.dtype, memory=story.memory)
    with (
        _folder(data_dir) as folder,
        opened(folder, output, is_private=True) as store,
        running_engine(settings, store, output) as parts,
    ):
        remember_base(settings, parts, store)
        stage = Stage(folder, store, parts, output)
        voices, agents = story.bring(stage), story.agents(stage)
        api = ApiSettings(data_dir=folder, admin_keys=(admin_key(folder).value,))
        app = create_app(engine=parts.worker, store=store, settings=api)
        with background(app), http_server(app, listener, signals) as server:
            rounds = _play(Showcase(parts, voices), story.prompts, output)
            chat = parts.worker.tokenizer.has_chat_template
            url, prompt = url_of(listener), story.prompts[0]
            try_it = TryIt(url, story.served_name, voices, prompt, folder, chat=chat, note=story.note, agents=agents)
            _report(rounds, try_it, output)
            if not once:
                show_try_it(try_it, output)
                signals.wait(while_true=lambda: server.is_alive)


def shipped_story(prompts: Sequence[str] | None) -> Story:
    """Three tenants whose adapters come with the demo, on the tiny base."""
    adapters = assets.demo_adapters()
    return Story(
        base=assets.demo_base_path(),
        served_name=assets.BASE_NAME,
        bring=lambda stage: introduce(stage.store, stage.parts.base.description, adapters),
        prompts=prompts or assets.SHOWCASE_PROMPTS[:NUM_PROMPTS],
        note=assets.USAGE_NOTE,
        agents=lambda stage: published(stage.store, stage.parts.base.description, assets.demo_agents(), AGENT_NAME),
    )


def real_story(prompts: Sequence[str] | None, output: Output) -> Story:
    """One tenant that learns now, on SmolLM2. Raises CommandError (no_real_base) if its package is missing."""
    file = real.packaged_model()
    if file is None:
        raise CommandError("no_real_base", f"--real needs {real.BASE_NAME}: {real.INSTALL}", ExitCode.NOT_FOUND)
    base, _ = find_base(str(file), output)
    return Story(
        base=base,
        served_name=real.BASE_NAME,
        bring=_taught,
        prompts=prompts or real.PROMPTS,
        note=real.NOTE,
        memory=REAL_MEMORY,
        dtype="float32",  # as it is trained: the gate's references are slow in bfloat16 on many CPUs
    )


def _taught(stage: Stage) -> list[Voice]:
    onboarding = Onboarding(stage.folder, stage.store.database, remote=stage.store.remote)
    voice = learned(
        stage.store,
        onboarding,
        stage.output,
        tenant=real.TENANT,
        model=stage.parts.worker.served_name,
        data=real.LESSON_FILE,
        general=real.GENERAL_FILE,
        spec=real.LESSON_SPEC,
    )
    return [Voice(BASE), voice]


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
        agent=AGENT_NAME,
        keys={voice.name: voice.api_key for voice in (*try_it.voices, *try_it.agents) if voice.api_key is not None},
        rounds=[
            {"prompt": each.prompt, "answers": {name: answer.text for name, answer in each.answers.items()}}
            for each in rounds
        ],
        tokens_per_s=round(summary.tokens_per_s, 1),
        **asdict(summary),
    )
