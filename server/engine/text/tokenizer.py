"""Text to tokens and back, and chats to prompts, for one base model. Knows nothing of requests or HTTP.

Encoding and decoding use a private copy of the Rust tokenizer that never changes after construction, so any number of
threads may share it. transformers' own `tokenizer(...)` call switches truncation on and off on a shared object:
measured, one thread's truncation cuts another thread's prompt without an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from secrets import token_hex
from typing import Any

import jinja2
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerBase

from adapters_store.base.end_of_turn import end_of_turn_id
from adapters_store.base.families import UnsupportedBase
from adapters_store.base.folder import read_json, reading
from adapters_store.base.tokenizer import load_tokenizer
from adapters_store.dialects.catalog import all_markers, tool_template
from adapters_store.dialects.rendering import with_tools
from adapters_store.parsing.template_sandbox import TemplateSandbox, chat_variables
from server.engine.request import InvalidRequest, check_unicode
from server.engine.text.chat_options import ChatOptions, TemplateValue
from server.engine.text.control_tokens import ControlTokens, without_added_tokens
from server.engine.text.token_text import TokenTexts
from server.engine.text.vocabulary import Vocabulary

Message = Mapping[str, Any]  # one OpenAI chat message: role, content as one string, and what templates read beyond

_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_PLAIN_CHAT = ChatOptions()
_SHORT = 4096  # characters or ids; only the calls for longer texts release the GIL
_MAX_ERROR_CHARACTERS = 300  # of a template's own message, which may quote the whole chat


class Tokenizer:
    """Thread-safe wrapper of a fast transformers tokenizer. Raises ValueError for one that is not fast.

    eos_ids: tokens that end a sequence, besides the tokenizer's own. chat_end_ids: tokens that end a chat's answer: the
    same, and the one that ends a turn in the chat template. token_texts: each token's exact bytes.
    vocab_size: one more than the highest id with a token; a model's logits may be wider.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no fast form (tokenizer.json), which serving needs")
        self._template_owner = tokenizer
        self._backend: FastTokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.token_texts = TokenTexts(self._backend)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_ids = frozenset(id_ for id_ in (*eos_ids, *own_eos) if 0 <= id_ < self.vocab_size)
        end_of_turn = end_of_turn_id(tokenizer)
        self.chat_end_ids = self.eos_ids if end_of_turn is None else self.eos_ids | {end_of_turn}

    @classmethod
    def load(cls, folder: Path, loaded: PreTrainedTokenizerBase | None = None) -> Tokenizer:
        """Read tokenizer, chat template and end-of-sequence ids from a model's folder. loaded: its tokenizer, if it was
        read before. Raises UnsupportedBase."""
        tokenizer, eos_ids = load_tokenizer(folder) if loaded is None else loaded, _configured_eos_ids(folder)
        with reading(folder, "the tokenizer"):
            return cls(tokenizer, eos_ids)

    def vocabulary(self, num_rows: int) -> Vocabulary:
        """The ids served over a model with that many embedding rows. Raises ValueError if there are none."""
        return Vocabulary(num_rows, self._backend.get_vocab(with_added_tokens=True))

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        """Tokens that spell no text: special ones, and added ones of the form <...> or [...], which templates use."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special or _MARK.fullmatch(token.content))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template_owner.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of `text`. Raises InvalidRequest(param) for text that is not Unicode (a lone surrogate)."""
        try:
            if len(text) <= _SHORT:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:  # the Rust side's only word for a string that UTF-8 cannot hold
            check_unicode(param, text)
            raise

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if len(token_ids) <= _SHORT:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def added_ids(self, names: Iterable[str]) -> dict[str, int]:
        """The added token of each name that has one. Ordinary tokens are none: other tokens can spell them too."""
        return {name: self._ids_of_added[name] for name in names if name in self._ids_of_added}

    @cached_property
    def _ids_of_added(self) -> dict[str, int]:
        return {token.content: id_ for id_, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def chat_template(self) -> str:
        """The one that chats with tools get; "" without one."""
        return tool_template(self._template_owner.chat_template)

    def control_tokens(self, template: str | None = None) -> ControlTokens:
        """Of an adapter's chat template; None: of the base's. Kept for the templates used last."""
        return self._control_tokens_of(str(self._template_owner.chat_template) if template is None else template)

    @cached_property
    def _control_tokens_of(self) -> Callable[[str], ControlTokens]:
        plain, markers = without_added_tokens(self._backend), " ".join(all_markers())
        return lru_cache(maxsize=8)(lambda template: ControlTokens(self._backend, f"{template} {markers}", plain))

    @cached_property
    def sandbox(self) -> TemplateSandbox:
        """Where adapters' templates are rendered."""
        return TemplateSandbox()

    def encode_chat(self, messages: Sequence[Message], options: ChatOptions = _PLAIN_CHAT) -> list[int]:
        """The prompt that the chat template makes of `messages`, as token ids.

        Raises InvalidRequest if there is no chat template, a request may not set a template variable, or the template
        itself refuses.
        """
        if not self.has_chat_template and options.template is None:
            raise InvalidRequest("messages", "this model has no chat template", code="chat_template_missing")
        if not messages:
            raise InvalidRequest("messages", "messages must have at least 1 entry, got 0")
        plain = {"messages": [dict(message) for message in messages], "tools": [dict(tool) for tool in options.tools]}
        options.check_names(self._template_owner)
        if not options.escape_control_tokens:
            text = self._rendered(**plain, options=options, variables=options.variables)
            return self.encode(text, add_special_tokens=False, param="messages")
        control = self.control_tokens(options.template)
        text = self._rendered(**control.marked(plain), options=options, variables=control.marked(options.variables))
        return control.encode(text)

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        options: ChatOptions,
        variables: Mapping[str, TemplateValue],
    ) -> str:
        try:
            shown, listed = with_tools(options.template or self.chat_template, options.dialect, messages, tools)
            if options.template is not None:
                return self._rendered_apart(options.template, shown, listed, options, variables)
            rendered = self._template_owner.apply_chat_template(
                shown,
                tools=listed,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **variables,
            )
            return str(rendered)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # the template renders other messages, so an error in it is the fault of these
            reason = str(error)[:_MAX_ERROR_CHARACTERS]
            raise InvalidRequest("messages", f"the chat template refused the messages: {reason}") from error

    def _rendered_apart(
        self,
        template: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: ChatOptions,
        variables: Mapping[str, TemplateValue],
    ) -> str:
        """An adapter's template, in a process of its own, by transformers' rules. Raises TemplateFailed, and ValueError
        if the template does not show the message that is to be continued."""
        end = f"END{token_hex(8)} " if options.continue_final_message else ""
        shown = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
        names = chat_variables(
            self._template_owner.special_tokens_map,
            shown,
            tools,
            add_generation_prompt=options.add_generation_prompt,
            others=variables,
        )
        text = self.sandbox.render(template, names)
        if not end:
            return text
        before, mark, after = text.rpartition(end.rstrip())
        if not mark:
            raise ValueError("it does not show the message that is to be continued")
        return before if after.startswith(" ") else before.rstrip()  # without the blank, the template trims messages


def _configured_eos_ids(folder: Path) -> list[int]:
    return [id_ for name in ("generation_config.json", "config.json") for id_ in _eos_ids_in(folder / name)]


def _eos_ids_in(path: Path) -> list[int]:
    """Raises UnsupportedBase for an eos_token_id that is no id."""
    config = read_json(path) if path.is_file() else {}
    found = [part.get("eos_token_id") for part in (config, config.get("text_config")) if isinstance(part, dict)]
    ids = [id_ for value in found if value is not None for id_ in (value if isinstance(value, list) else [value])]
    odd = [id_ for id_ in ids if not isinstance(id_, int) or isinstance(id_, bool)]
    if odd:
        reason = f"{path.name}: eos_token_id must be a token id or a list of them, got {odd[0]!r:.60}"
        raise UnsupportedBase(f"--base {path.parent}: {reason}")
    return ids
