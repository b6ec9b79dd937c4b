"""A process that renders chat templates which tenants sent. Each is rendered in a child of its own, and nothing stays.
Only the renderings of one training run share a child.

    main(), with argument FD

FD: a socket that brings one more socket for each child, on which JSON requests come and JSON answers go, one a line.
Jinja's sandbox keeps a template from Python's inside; limits of the kernel end a child that uses too much. Imports
nothing large.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CPU_S = 1.0
MAX_MORE_BYTES = 256 << 20
_MAX_REAL_S = 30
_MAX_ERROR_CHARS = 200
_FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError)


class _Generation(Extension):
    """transformers' tag around an answer; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own type

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a chat template."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


@lru_cache(maxsize=1)
def _compiled(made: ImmutableSandboxedEnvironment, template: str) -> Template:
    return made.from_string(template)


def _answer(made: ImmutableSandboxedEnvironment, request: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compiled(made, request["template"]).render(**request["variables"])
    except _FAULTS as error:
        return {"error": str(error)[:_MAX_ERROR_CHARS]}
    if len(text) > request["max_chars"]:
        return {"error": f"it makes {len(text)} characters, the limit is {request['max_chars']}"}
    return {"text": text}


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MORE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _limit_time() -> None:
    """Of the next rendering; the signals of the timers end the process."""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, _MAX_REAL_S)


def _render(made: ImmutableSandboxedEnvironment, fd: int) -> None:
    _limit_memory()
    with socket.socket(fileno=fd) as connection, connection.makefile("rb") as requests:
        for request in requests:
            _limit_time()
            connection.sendall(json.dumps(_answer(made, json.loads(request))).encode() + b"\n")
            signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control, made = socket.socket(fileno=int(sys.argv[1])), environment()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            try:
                control.close()
                _render(made, fds[0])
            finally:
                os._exit(0)
        os.close(fds[0])
