"""Why a grammar is refused, in words of our own: llguidance's messages quote the grammar, which may be secret.

Runs in the checker's process too, so it imports nothing large.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
_KEYWORDS = {
    "$anchor", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "$ref",
    "$vocabulary", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains",
    "contentEncoding", "contentMediaType", "contentSchema", "dependencies", "dependentRequired",
    "dependentSchemas", "else", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items",
    "maxContains", "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern", "patternProperties", "prefixItems",
    "properties", "propertyNames", "required", "then", "type", "unevaluatedItems", "unevaluatedProperties",
    "uniqueItems",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """code: the API's. message: the rest of a sentence that begins with the field's name; it quotes no grammar."""

    code: str
    message: str
    status: int = 400


TIMED_OUT = Refusal("grammar_too_complex", "takes too long to compile")
CRASHED = Refusal("grammar_too_complex", "nests too deeply or needs too much memory to compile")
NO_TEXT = Refusal("invalid_grammar", "allows no text: every way through it is endless or contradicts itself")
TOO_MUCH = Refusal("grammar_too_complex", "is too large or too complex")
_TOO_DEEP = Refusal("grammar_too_complex", "nests too deeply")
_REGEX_TOO_DEEP = Refusal("grammar_too_complex", "has a pattern that nests too deeply: at most 250 levels are served")
_LARK_TOO_DEEP = Refusal("grammar_too_complex", "nests too deeply: at most 28 levels of parentheses are served")
_NO_REGEX = Refusal("invalid_grammar", "has a pattern that is not a regular expression")
_NO_REFERENCE = Refusal("invalid_grammar", "has a $ref that leads nowhere in the schema")
_LOOKS_AROUND = Refusal("unsupported_grammar", "has a pattern with look-around or a back-reference")
_OVERLAPS = Refusal("unsupported_grammar", "uses oneOf with alternatives that may overlap; use anyOf")

_REASONS = (
    ("oneOf constraints", _OVERLAPS),
    ("Unknown format", Refusal("unsupported_grammar", "uses a string format that is not served")),
    ("Invalid type", Refusal("invalid_grammar", "has a type that JSON Schema does not know")),
    (r"not present in a registry|pointer|unresolvable|\$ref|anchor", _NO_REFERENCE),
    ("look-around|backreference", _LOOKS_AROUND),
    ("nest limit|number of nested", _REGEX_TOO_DEEP),
    ("grammar too deeply nested", _LARK_TOO_DEEP),
    ("recursion limit|too deeply nested", _TOO_DEEP),
    ("too (big|large|complex|many)|limit|fuel|expensive", TOO_MUCH),
    (r"for (integer|float) range", Refusal("unsupported_grammar", "has a minimum or maximum of too many digits")),
    ("regex|pattern", _NO_REGEX),
    ("unsatisfiable|empty", NO_TEXT),
)


def is_too_complex(error: str) -> bool:
    """Whether a matcher stopped at a limit; else it met a token, or the end of a grammar, that nothing can follow."""
    return "satisfy the grammar" not in error and "NoExtension" not in error


def refusal_of(message: str) -> Refusal:
    """For an error of llguidance's."""
    unimplemented = _UNIMPLEMENTED.search(message)
    if unimplemented:
        names = sorted(set(re.findall(r'"([^"]*)"', unimplemented[1])) & _KEYWORDS)
        return Refusal(
            "unsupported_grammar", f"uses keywords that are not served: {', '.join(names) or 'unknown ones'}"
        )
    for pattern, refusal in _REASONS:
        if re.search(pattern, message, re.IGNORECASE):
            return refusal
    return Refusal("invalid_grammar", "cannot be compiled")
