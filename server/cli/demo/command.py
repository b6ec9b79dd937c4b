"""`multilora demo`: reads the options and hands over to `run`, which knows the engine."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Annotated

import typer

from lora_kernels.process import unscanned_imports
from server.cli.common.failures import CommandError
from server.cli.common.listening import bound
from server.cli.common.logging_setup import set_up_logging
from server.cli.common.options import JsonOption
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals

HOST = "127.0.0.1"
PORT = 8000


def demo(
    *,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Ask this instead; may be given more than once.")
    ] = None,
    real: Annotated[
        bool, typer.Option("--real", help="A real model, SmolLM2-135M, and a tenant that trains its adapter now.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="End after the showcase.")] = False,
    port: Annotated[
        int | None, typer.Option(help=f"Port to listen on (default: {PORT}, or a free one).", min=0, max=65535)
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder for tenants and adapters (default: a temporary one).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show three tenants' adapters answering in one batch on a tiny base, without download or GPU.

    With --real: a tenant teaches SmolLM2-135M its manner in front of you, passes the gate, and answers beside the base.
    The server then runs until Ctrl-C and shows curl lines to paste. With --json: one object with the answers.
    """
    output = Output(as_json=as_json)
    set_up_logging(ours=logging.WARNING)
    with StopSignals() as signals, _listener(port) as listener:
        with output.waiting("importing torch and transformers"), unscanned_imports():
            from server.cli.demo import run as demo_run
        story = demo_run.real_story(prompt, output) if real else demo_run.shipped_story(prompt)
        demo_run.run(story, listener, output, signals, data_dir=data_dir and data_dir.expanduser(), once=once)


def _listener(port: int | None) -> socket.socket:
    """Without --port any free port will do."""
    if port is not None:
        return bound(HOST, port)
    try:
        return bound(HOST, PORT)
    except CommandError:
        return bound(HOST, 0)
