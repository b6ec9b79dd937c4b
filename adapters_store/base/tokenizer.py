"""Loads a base's tokenizer and tries its chat template: for server, trainer and gate. Knows no model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapters_store.base.families import UnsupportedBase
from adapters_store.base.folder import read_json, reading, refuse_pointers
from adapters_store.parsing.template_sandbox import (
    PLAIN_CHATS,
    PLAIN_NAMES,
    SandboxEnded,
    TemplateFailed,
    TemplateSandbox,
    TemplateTooCostly,
)

_log = logging.getLogger(__name__)
SERIALISED, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
DEFAULT_TEMPLATE = "default"
_VOCABULARIES = ((SERIALISED,), ("vocab.json", "merges.txt"))
_CONVERT = (
    "write a tokenizer.json beside it: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`, with sentencepiece "
    "installed"
)


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a local folder; nothing is fetched, and no code of the folder runs.

    Raises UnsupportedBase if its files are missing, unreadable or only pointers, if it needs the folder's own code, if
    two tokens of its vocabulary share an id, or if its chat template renders no chat.
    """
    refuse_pointers(folder)
    _refuse_own_code(folder)
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        # Converted here, its tokens would depend on what is installed; a broken one was served with a token or two.
        if (folder / SENTENCEPIECE).is_file():
            raise UnsupportedBase(f"--base {folder}: {SENTENCEPIECE}, a SentencePiece model alone: {_CONVERT}")
        raise UnsupportedBase(f"--base {folder}: no tokenizer there; {SERIALISED} is needed")
    with reading(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _refuse_shared_ids(folder, tokenizer)
    check_template(tokenizer, f"--base {folder}")
    return tokenizer


def _refuse_own_code(folder: Path) -> None:
    """If the config names a class of transformers as well, that one is used."""
    path = folder / "tokenizer_config.json"
    body = read_json(path) if path.is_file() else {}
    own, name = body.get("auto_map"), body.get("tokenizer_class")
    if own and _is_unknown(name):
        reason = f"the tokenizer {name!r:.80} needs Python code of the folder, which is never run"
        raise UnsupportedBase(f"--base {folder}: {reason}; a tokenizer of transformers itself is needed")


def _refuse_shared_ids(folder: Path, tokenizer: Any) -> None:
    """Which of two tokens an id stands for is decided by the order of a hash map, anew in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: Mapping[str, int] = {} if backend is None else backend.get_vocab(with_added_tokens=False)
    tokens: dict[int, str] = {}
    for token, id_ in vocabulary.items():
        if id_ in tokens:
            first, second = sorted((f"{tokens[id_]!r:.40}", f"{token!r:.40}"))
            raise UnsupportedBase(f"--base {folder}: the tokenizer's tokens {first} and {second} share the id {id_}")
        tokens[id_] = token


def _is_unknown(name: object) -> bool:
    import transformers

    return not isinstance(name, str) or not name.isidentifier() or not hasattr(transformers, name)


def check_template(tokenizer: Any, source: str) -> None:
    """Compile every chat template, and render some plain chats. No template at all is fine.

    Raises UnsupportedBase if one is no Jinja, if named ones lack a default, or if none of the chats renders.
    """
    templates = tokenizer.chat_template
    if not templates:
        return
    if isinstance(templates, Mapping) and DEFAULT_TEMPLATE not in templates:
        names = ", ".join(sorted(templates))
        reason = f"chat templates are named ({names}), but none is called {DEFAULT_TEMPLATE!r}, which requests get"
        raise UnsupportedBase(f"{source}: {reason}; give one that name")
    named = templates if isinstance(templates, Mapping) else {DEFAULT_TEMPLATE: templates}
    for name, text in named.items():
        fault = _fault_of(tokenizer, text)
        if fault is not None:
            label = "the chat template" if len(named) == 1 else f"the chat template {name!r}"
            raise UnsupportedBase(f"{source}: {label} {fault}; fix it, or remove it to serve completions only")


def _fault_of(tokenizer: Any, template: str) -> str | None:
    """None if one of the plain chats renders."""
    first = _cost_of(template) if isinstance(template, str) else ""
    if first:
        return first
    for chat in PLAIN_CHATS:
        try:
            tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # noqa: BLE001  a template may trip over anything, and no class unites it
            line = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
            first = first or f"fails{line}: {' '.join(str(error).split())[:200]}"
        else:
            return None
    return first


@lru_cache(maxsize=64)
def _cost_of(template: str) -> str:
    """What it says of a template that a start must not render here: it may take for ever. "" for all others, also those
    that fail."""
    with TemplateSandbox() as sandbox:
        for chat in PLAIN_CHATS:
            try:
                sandbox.render(template, {**PLAIN_NAMES, "messages": chat})
            except TemplateTooCostly as error:
                return f"fails on a plain chat: {error}"
            except SandboxEnded as error:
                _log.warning("a chat template is rendered without limits: %s", error)
                return ""
            except TemplateFailed:
                continue
            return ""
    return ""
