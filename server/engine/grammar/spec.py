"""What a client may ask for: the kinds of grammars, and each one's text in the form that llguidance reads.

Runs in the checker's process too, so it imports nothing large.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from adapters_store.parsing.json_schema import without_idle_keywords

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "lark"]
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 1024
_BLANKS = r"[ \t]{1,8}|\r?\n[ \t]{0,64}"  # between two JSON tokens: no model fills its answer with blanks
MAX_SCHEMA_LEVELS = 124  # llguidance's reader of JSON takes 127, three of them around the schema
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[{}\]]')
_LARGEST_MULTIPLE = 1000  # its automaton has a state for each remainder


class UnreadableGrammar(ValueError):
    """The text is not of its kind."""


class TooComplex(ValueError):
    """What it asks for would take too long to compile."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar as a client sends it. text: of a json_schema and of a choice, JSON; of a grammar, Lark or GBNF; of
    lark, Lark that this server wrote itself.

    compact: no blanks between JSON tokens. before: Lark that this server wrote, with the grammar's text at @answer.
    """

    kind: GrammarKind
    text: str
    compact: bool = False
    before: str = ""

    def compiled_form(self) -> str:
        """llguidance's own form. Raises UnreadableGrammar or TooComplex; may not return for hostile text."""
        form = self._own_form()
        if not self.before:
            return form
        is_json = self.kind in ("json_schema", "regex")
        answer = json.loads(form)["grammars"][0] if is_json else {"lark_grammar": form}
        return json.dumps({"grammars": [{"lark_grammar": self.before}, {**answer, "name": "answer"}]})

    def _own_form(self) -> str:
        match self.kind:
            case "json_schema":
                return self._schema_form()
            case "regex":
                return str(LLMatcher.grammar_from_regex(self.text))
            case "choice":
                return str(LLMatcher.grammar_from_lark(_choice_lark(json.loads(self.text))))
            case "lark":
                return str(LLMatcher.grammar_from_lark(self.text))
            case "grammar":
                return str(LLMatcher.grammar_from_lark(_lark(self.text)))

    def _schema_form(self) -> str:
        overrides: JsonCompileOptions = {"lenient": False, "item_separator": ",", "key_separator": ":"}
        if self.compact:
            overrides["whitespace_flexible"] = False
        else:
            overrides["whitespace_pattern"] = _BLANKS
        _check_levels(self.text)
        try:
            schema = json.loads(self.text)
            _check_multiples(schema)
            served = without_idle_keywords(schema)
            text = self.text if served == schema else json.dumps(served)
            return str(LLMatcher.grammar_from_json_schema(text, overrides=overrides))
        except TooComplex:
            raise
        except ValueError as error:
            raise UnreadableGrammar("not a JSON schema") from error


def _check_levels(text: str) -> None:
    """Of JSON, whole or not."""
    level = deepest = 0
    for found in _STRINGS_AND_BRACKETS.finditer(text):
        level += (found[0] in "[{") - (found[0] in "}]")
        deepest = max(deepest, level)
    if deepest > MAX_SCHEMA_LEVELS:
        raise TooComplex(f"nests too deeply: {deepest} levels, at most {MAX_SCHEMA_LEVELS} are served")


def _check_multiples(schema: Any) -> None:
    members = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and isinstance(value := schema.get("multipleOf"), int) and value > _LARGEST_MULTIPLE:
        raise TooComplex(f"uses multipleOf above {_LARGEST_MULTIPLE}")
    for member in members:
        _check_multiples(member)


def _choice_lark(choices: list[str]) -> str:
    """One terminal, so that a lexer reads all choices at once."""
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:
        raise UnreadableGrammar("neither Lark nor GBNF") from error
