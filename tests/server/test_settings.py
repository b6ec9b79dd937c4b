"""A setting is checked by its one definition, wherever the value comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from server.settings import built, check_settings, section, setting, settings_of

KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = setting(0.5, "A share.", at_least=0, below=1)
    memory_bytes: int | None = setting(None, "Memory.", at_least=1, name="memory_kib", factor=KIB)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Outer:
    place: str
    count: int = setting(3, "A count.", at_least=1, at_most=9)
    speed_s: float = setting(1.0, "A time.", above=0)
    colour: str = setting("red", "A colour.", choices=("red", "blue"))
    key: str | None = setting(None, "A key.", secret=True)
    names: tuple[str, ...] = setting((), "Names.")
    hides_tokens: bool = setting(False, "Whether tokens are hidden.")
    inner: Inner = section("Inner", prefix="inner_", default_factory=Inner)

    def __post_init__(self) -> None:
        check_settings(self)


def test_settings_are_found_in_order_with_their_sections() -> None:
    found = {each.name: each for each in settings_of(Outer, group="Outer")}
    assert list(found) == [
        *("count", "speed_s", "colour", "key", "names", "hides_tokens"),
        *("inner_share", "inner_memory_kib"),
    ]
    assert [each.group for each in found.values()] == ["Outer"] * 6 + ["Inner"] * 2
    assert [each.kind for each in found.values()] == [int, float, str, str, str, bool, float, int]
    assert found["speed_s"].unit == "seconds"
    assert found["hides_tokens"].unit == "", "a yes or no is in no unit"
    assert found["inner_share"].option == "--inner-share"
    assert found["inner_share"].environment == ("MULTILORA_INNER_SHARE",)
    assert found["inner_share"].about.limits == ">= 0, < 1"
    assert found["names"].type_name == "list of text"


def test_values_reach_their_fields_in_the_fields_unit() -> None:
    made = built(Outer, {"place": "here", "count": 4, "inner_share": 0.25, "inner_memory_kib": 2, "names": ("a",)})
    assert made == Outer(place="here", count=4, names=("a",), inner=Inner(share=0.25, memory_bytes=2 * KIB))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 10}, "count must be at most 9, got 10"),
        ({"speed_s": 0.0}, "speed_s must be above 0, got 0"),
        ({"speed_s": math.nan}, "speed_s must be above 0, got nan"),
        ({"colour": "green"}, "colour must be one of red, blue, got 'green'"),
        ({"inner_share": 1.0}, "share must be below 1, got 1"),
        ({"inner_memory_kib": 0}, "memory_bytes must be at least 1, got 0"),
    ],
)
def test_a_value_beyond_its_limits_is_refused_with_the_limit(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built(Outer, {"place": "here", **values})


def test_a_secret_is_not_in_the_text_of_its_settings() -> None:
    assert "sesame" not in repr(Outer(place="here", key="sesame"))
