"""Every error code in the product's sources, with the status and the words it is answered with.

A class counts if its constructor takes a `code`; a function counts if it takes a `code` and returns such a class.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import adapters_store
import server
import trainer
from adapters_store.errors import AdapterRejected, InputRefused, UserError
from server.api.wire.errors import ApiError
from support.reference.table import table

PACKAGES = (adapters_store, server, trainer)
NOT_IMPORTED = (".migrations", "__main__", ".locustfile")
GIVEN_MAKER = "refused"  # the parameter through which `parse_strict_json` is given the error to make
GIVEN_AS = "too_many"  # the one parameter of another name through which a code is given
BY_FORM = {"requests_per_minute": 429, "tokens_per_minute": 429}  # made as f"{what}_per_minute"
PARTS = (("trainer.gate.", "gate"), ("trainer.", "training"), ("server.jobs.", "job"))
_CODE = re.compile(r"[a-z][a-z0-9_]+")
_LISTED = re.compile(r"(unsupported|regex|base_altering|missing|invalid|unknown|too)_[a-z_]+$")


@dataclass(frozen=True, slots=True)
class Raised:
    """One call in the sources that makes an error. message: as written, {} for what is filled in."""

    code: str
    maker: type
    status: int | None
    exit_code: int | None
    message: str

    @property
    def http_status(self) -> int | None:
        """Of the answer that the server makes of it; None if no answer is made of it directly."""
        if self.status is not None:
            return self.status
        status = getattr(self._instance(), "status", None)
        return None if isinstance(self._instance(), UserError) and status == 500 else status

    @property
    def exit_status(self) -> int | None:
        """Of the command that ends with it; None if commands do not."""
        if self.exit_code is not None:
            return int(self.exit_code)
        error = self._instance()
        return int(error.exit_code) if isinstance(error, UserError) else None

    @property
    def part(self) -> str:
        """Where else than in an answer or from a command it is seen."""
        name = f"{self.maker.__module__}."
        return next((part for start, part in PARTS if name.startswith(start)), "")

    def _instance(self) -> Any:
        """One such error; None for those that are values with more fields."""
        for values in ((self.code, ""), ("",)):  # the latter: a class with one code of its own
            try:
                return self.maker(*values)
            except TypeError:
                continue
        return None


def modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not any(part in found.name for part in NOT_IMPORTED):
                yield importlib.import_module(found.name)


def raised() -> list[Raised]:
    """All calls that name a code."""
    everywhere = list(modules())
    return [found for module in everywhere for found in _in_module(module)]


def _in_module(module: ModuleType) -> Iterator[Raised]:
    if module.__file__ is None:
        return
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call) and (maker := _value(node.func, module)) is not None:
            yield from _made(node, maker, module)
        if isinstance(node, ast.ClassDef) and (kind := vars(module).get(node.name)) is not None:
            yield from (Raised(code, kind, None, None, "") for code in _own_codes(node))
        if isinstance(node, ast.Call) and len(node.args) == 2 and ast.unparse(node.func).split(".")[-1] == GIVEN_MAKER:
            message = _text(_assigned(node.args[1], _tree(module)))
            yield from (Raised(code, InputRefused, None, None, message) for code in _codes(node.args[0], module))
        if isinstance(node, ast.keyword) and node.arg == GIVEN_AS and isinstance(node.value, ast.Constant):
            yield Raised(str(node.value.value), AdapterRejected, None, None, "")


def _own_codes(node: ast.ClassDef) -> Iterator[str]:
    """The code that a class gives itself: the first text in its call of `super().__init__`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__" and call.args:
            first = call.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and _CODE.fullmatch(first.value):
                yield first.value


def _made(call: ast.Call, maker: Any, module: ModuleType) -> Iterator[Raised]:
    kind = _kind_of(maker)
    if kind is None:
        return
    parameters = inspect.signature(maker).parameters
    given = dict(zip(parameters, call.args, strict=False)) | {
        word.arg: word.value for word in call.keywords if word.arg
    }
    message = _text(_assigned(given.get("message"), _tree(module)))
    status = _value(given["status"], module) if "status" in given else _status_within(maker)
    exit_code = _value(given["exit_code"], module) if "exit_code" in given else None
    codes = list(_codes(given.get("code"), module))
    if "code" not in given and isinstance(parameters["code"].default, str):
        codes.append(parameters["code"].default)
    if "code" in given and not codes:
        codes = list(_listed(given["code"], module))
        message = ""
    for code in codes:
        yield Raised(code, kind, status if isinstance(status, int) else None, exit_code, message)


def _status_within(maker: Any) -> int | None:
    """The status that a function gives its error; None for a class, and for a function that has it given."""
    if not inspect.isfunction(maker):
        return None
    words = re.findall(r"\((?:status=)?([45]\d\d)\b", inspect.getsource(maker))
    return int(words[0]) if len(words) == 1 else None


def _listed(node: ast.expr, module: ModuleType) -> Iterator[str]:
    """Codes that a call takes from a table or a loop of its module: every text there that looks like one.

    `error.code` is an error passed on: it is counted where it was made.
    """
    if isinstance(node, ast.Name | ast.Call):
        for text in ast.walk(_tree(module)):
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and _LISTED.match(text.value):
                yield text.value


@cache
def _tree(module: ModuleType) -> ast.Module:
    assert module.__file__ is not None
    return ast.parse(Path(module.__file__).read_text())


def _kind_of(maker: Any) -> type | None:
    """The class of error that the call makes; None: it makes none with a code."""
    if not inspect.isclass(maker) and not inspect.isfunction(maker):
        return None
    try:
        signature = inspect.signature(maker, eval_str=False)
    except (TypeError, ValueError):
        return None
    if "code" not in signature.parameters:
        return None
    if inspect.isclass(maker):
        return maker
    returned = vars(inspect.getmodule(maker)).get(str(signature.return_annotation))
    return returned if inspect.isclass(returned) else None


def _codes(node: ast.expr | None, module: ModuleType) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from _codes(node.body, module)
        yield from _codes(node.orelse, module)
    elif node is not None:
        value = _value(node, module)
        if isinstance(value, str) and _CODE.fullmatch(value):
            yield value


def _value(node: ast.expr, module: ModuleType) -> Any:
    """What a constant, a name of the module or an attribute of one means; None if only a run can tell."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return vars(module).get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, module), node.attr, None)
    return None


def _assigned(node: ast.expr | None, tree: ast.Module) -> ast.expr | None:
    """What was assigned, a few lines above, to the name that is given."""
    if not isinstance(node, ast.Name):
        return node
    found = [
        assign
        for assign in ast.walk(tree)
        if isinstance(assign, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == node.id for target in assign.targets)
        and 0 < node.lineno - assign.lineno < 15
    ]
    return max(found, key=lambda assign: assign.lineno).value if found else None


def _text(node: ast.expr | None) -> str:
    """The words of a message."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return ""


def section() -> str:
    """One row for each code: statuses, where else it is seen, and one of its messages."""
    found = raised() + [Raised(code, ApiError, status, None, "") for code, status in BY_FORM.items()]
    codes = sorted({one.code for one in found})
    rows = [_row(code, found) for code in codes]
    return table(("code", "HTTP", "exit", "also in", "a message"), [row for row in rows if any(row[1:4])])


def _row(code: str, found: list[Raised]) -> tuple[str, ...]:
    of_it = [one for one in found if one.code == code]
    statuses = sorted({one.http_status for one in of_it if one.http_status is not None})
    exits = sorted({one.exit_status for one in of_it if one.exit_status is not None})
    parts = sorted({one.part for one in of_it if one.part})
    message = next((one.message for one in of_it if one.message), "")
    return (
        f"`{code}`",
        ", ".join(map(str, statuses)),
        ", ".join(map(str, exits)),
        ", ".join(parts),
        message.replace("|", "\\|").replace("{}", "..."),
    )
