"""Renders chat templates within limits, in processes of their own (see `template_child`). Any thread may use it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import markupsafe

from adapters_store.parsing.template_child import MAX_CPU_S, MAX_MORE_BYTES

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_RENDERED_CHARS = 4 << 20
_PATIENCE_S = 40.0
_END_S = 1.0
_CHILD = "import sys; sys.path += sys.argv[2:]; from adapters_store.parsing.template_child import main; main()"
_TOO_MUCH = f"it needs more than {MAX_CPU_S:g} s of processor time or {MAX_MORE_BYTES >> 20} MiB of memory"


_USER, _ANSWER = {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}
PLAIN_CHATS = ([_USER], [{"role": "system", "content": "Be brief."}, _USER], [_USER, _ANSWER, _USER])
"""A template must render one of these."""
PLAIN_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "tools": None,
    "documents": None,
}


class TemplateFailed(ValueError):
    """The template gives no text. The message may quote what it raised itself."""


class TemplateTooCostly(TemplateFailed):
    """It needs more time or memory than a template may take."""


class SandboxEnded(TemplateFailed):
    """The process that renders has ended by itself; nothing is known of the template."""


class TemplateSandbox(AbstractContextManager["TemplateSandbox"]):
    """Starts its process when it is first needed, and again if that has ended. Close it, or use it as a context."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, template: str, variables: Mapping[str, Any], *, max_chars: int = MAX_RENDERED_CHARS) -> str:
        """Raises TemplateFailed."""
        with self.child() as connection:
            return self.render_in(connection, template, variables, max_chars=max_chars)

    def child(self) -> socket.socket:
        """A connection to one more child, which lives until it is closed or a rendering takes too much.

        Raises SandboxEnded.
        """
        mine, theirs = socket.socketpair()
        mine.settimeout(_PATIENCE_S)
        try:
            with theirs:
                self._hand_over(theirs)
        except OSError as error:
            mine.close()
            raise SandboxEnded(f"the process that renders templates does not start: {error}") from error
        return mine

    def render_in(
        self, connection: socket.socket, template: str, variables: Mapping[str, Any], *, max_chars: int
    ) -> str:
        """In the child at the other end of the connection. Raises TemplateFailed."""
        request = {"template": template, "variables": dict(variables), "max_chars": max_chars}
        answer = _exchanged(connection, json.dumps(request).encode() + b"\n")
        if answer is None:
            if self._has_ended():
                raise SandboxEnded("the process that renders templates has ended")
            raise TemplateTooCostly(_TOO_MUCH)
        if "error" in answer:
            raise TemplateFailed(answer["error"])
        return answer["text"]

    def close(self) -> None:
        with self._lock:
            if self._control is not None and self._process is not None:
                self._control.close()
                self._process.wait()
            self._control = self._process = None

    def _has_ended(self) -> bool:
        """A template that is too costly ends a child of the process, never the process."""
        process = self._process
        try:
            return process is None or process.wait(_END_S) is not None
        except subprocess.TimeoutExpired:
            return False

    def _hand_over(self, theirs: socket.socket) -> None:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._control is not None
            socket.send_fds(self._control, [b"r"], [theirs.fileno()])

    def _start(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, child_end = socket.socketpair()
        with child_end:
            fd = child_end.fileno()
            command = [sys.executable, "-P", "-c", _CHILD, str(fd), *_folders()]
            self._process = subprocess.Popen(
                command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={}
            )


class OwnersTemplates:
    """Renders in one child, without a fork each time: for the many chats of one owner. One thread only."""

    def __init__(self) -> None:
        self._sandbox = TemplateSandbox()
        self._connection: socket.socket | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises TemplateFailed."""
        if self._connection is None:
            self._connection = self._sandbox.child()
        try:
            return self._sandbox.render_in(self._connection, template, variables, max_chars=MAX_RENDERED_CHARS)
        except TemplateFailed:
            self._connection.close()
            self._connection = None
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._sandbox.close()


def chat_variables(
    special_tokens: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    add_generation_prompt: bool,
    others: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a template reads of a chat, in service and in training: what transformers' `apply_chat_template` gives it.
    others: variables that the request sets."""
    names = {name: str(token) for name, token in special_tokens.items()} | dict(others)
    chat = {"messages": list(map(_with_thinking, messages)), "tools": tools, "documents": None}
    return names | chat | {"add_generation_prompt": add_generation_prompt}


def _with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """gpt-oss' templates read reasoning by this name."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _folders() -> list[str]:
    """Where this process found what the child imports: the environment, which may have said so, is not handed on."""
    files = (Path(__file__).parents[2], *(Path(str(module.__file__)).parents[1] for module in (jinja2, markupsafe)))
    return list(dict.fromkeys(map(str, files)))


def _exchanged(connection: socket.socket, request: bytes) -> dict[str, str] | None:
    """None for a child that ended before its answer was whole."""
    parts: list[bytes] = []
    try:
        connection.sendall(request)
        while not parts or not parts[-1].endswith(b"\n"):
            parts.append(connection.recv(1 << 16))
            if not parts[-1]:
                return None
        answer: dict[str, str] = json.loads(b"".join(parts))
    except (OSError, ValueError):
        return None
    return answer
