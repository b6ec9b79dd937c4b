"""A setting is defined once: a field of a frozen dataclass, with its help, limits and unit. Knows no setting itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from operator import ge, gt, le, lt
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_KEY = "multilora.setting"
_UNITS = {"_s": "seconds", "_bytes": "bytes", "_mib": "MiB", "_tokens": "tokens"}
_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a field says of itself. `above` and `below` are excluded themselves.

    name: for operators, if it is not the field's own. factor: the field's unit is so many times smaller than the
    operator's (bytes and MiB). secret: never shown. environment: further variables that set it. check: raises
    ValueError for a value (of a list: one item) that is not usable.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    name: str = ""
    unit: str = ""
    factor: int = 1
    group: str = ""
    metavar: str | None = None
    secret: bool = False
    environment: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None

    @property
    def limits(self) -> str:
        """As a table shows them."""
        signs = ((">=", self.at_least), (">", self.above), ("<=", self.at_most), ("<", self.below))
        return ", ".join([*self.choices, *(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)])

    def verify(self, name: str, value: Any) -> None:
        """Raises ValueError with the name, the value and the limit."""
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {value!r:.80}")
        broken = self._limit_broken_by(value) if isinstance(value, int | float) else ""
        if broken:
            raise ValueError(f"{name} must be {broken}, got {value}")
        if self.check is not None:
            self.check(value)

    def _limit_broken_by(self, value: float) -> str:
        """NaN breaks any."""
        rules = (
            (self.at_least, "at least", ge),
            (self.above, "above", gt),
            (self.at_most, "at most", le),
            (self.below, "below", lt),
        )
        given = [(limit, word, holds) for limit, word, holds in rules if limit is not None]
        return next((f"{word} {limit:g}" for limit, word, holds in given if not holds(value, limit)), "")


@dataclass(frozen=True, slots=True)
class _Section:
    prefix: str
    group: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as an operator knows it. kind: int, float, bool, str or Path."""

    name: str
    kind: type
    is_list: bool
    default: Any
    about: About
    group: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> tuple[str, ...]:
        """The variables that set it, the first one first."""
        return (f"MULTILORA_{self.name.upper()}", *self.about.environment)

    @property
    def unit(self) -> str:
        by_name = next((unit for end, unit in _UNITS.items() if self.name.endswith(end)), "")
        return self.about.unit or ("" if self.kind is bool else by_name)

    @property
    def type_name(self) -> str:
        kind = "choice" if self.about.choices else _TYPES[self.kind]
        return f"list of {kind}" if self.is_list else kind

    def check(self, value: Any) -> None:
        """Raises ValueError with the setting, the value and the limit. None, a value of no limit, always passes."""
        if value is None:
            return
        for each in value if self.is_list else (value,):
            self.about.verify(self.name, each)


def setting(default: Any, help: str, **about: Any) -> Any:
    """A field that an operator may set; `about` as in About. default None: chosen from the base or the machine."""
    details = About(help=help, **about)
    return field(default=default, repr=not details.secret, metadata={_KEY: details})


def section(group: str, *, prefix: str = "", default_factory: Callable[[], Any] | None = None) -> Any:
    """A field that holds settings of its own. prefix: of their names, where operators see them side by side."""
    metadata = {_KEY: _Section(prefix, group)}
    if default_factory is None:
        return field(metadata=metadata)
    return field(default_factory=default_factory, metadata=metadata)


def settings_of(cls: type, *, prefix: str = "", group: str = "") -> Iterator[Setting]:
    """Every setting of a dataclass and of its sections, in the order of their definition."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        about = item.metadata.get(_KEY)
        if isinstance(about, _Section):
            yield from settings_of(hints[item.name], prefix=about.prefix, group=about.group)
        elif about is not None:
            kind, is_list = _kind_of(hints[item.name])
            yield Setting(_name_of(item, prefix), kind, is_list, _default_of(item, about), about, about.group or group)


def built(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """The dataclass with these values by setting's name; a field without one keeps its default. A field that is no
    setting takes the value of its own name. Raises ValueError for a value that does not do."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        about = item.metadata.get(_KEY)
        if isinstance(about, _Section):
            arguments[item.name] = built(hints[item.name], values, prefix=about.prefix)
        elif (name := _name_of(item, prefix)) in values:
            arguments[item.name] = _held(hints[item.name], about, values[name])
    return cls(**arguments)


def _held(hint: Any, about: About | None, value: Any) -> Any:
    """As the field holds it: variables, files and Ray's arguments have no paths, no tuples and the operator's unit."""
    kind, is_list = _kind_of(hint)
    if is_list and about is not None:
        return tuple(value or ())  # an option that was not given is None
    if value is None:
        return None
    if kind is Path and not is_list:
        return Path(value)
    if about is None:
        return value
    return value * about.factor if about.factor > 1 else value


def check_settings(settings: Any) -> None:
    """For `__post_init__`: raises ValueError for the first field that breaks its limits."""
    for item in fields(settings):
        about, value = item.metadata.get(_KEY), getattr(settings, item.name)
        if isinstance(about, About) and value is not None:
            for each in value if isinstance(value, tuple) else (value,):
                about.verify(item.name, each)


def _default_of(item: Field[Any], about: About) -> Any:
    """In the operator's unit; None for a field without one."""
    if item.default is MISSING or item.default is None:
        return None
    return item.default // about.factor if about.factor > 1 else item.default


def _name_of(item: Field[Any], prefix: str) -> str:
    about = item.metadata.get(_KEY)
    return prefix + ((about.name if about is not None else "") or item.name)


def _kind_of(hint: Any) -> tuple[type, bool]:
    """int | None: int. tuple[str, ...]: str, a list."""
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    known = [each for each in get_args(hint) if each is not NoneType]
    kind = known[0] if known else hint
    return (kind if isinstance(kind, type) else str), False
