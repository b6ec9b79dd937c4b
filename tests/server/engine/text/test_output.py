from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import ReasoningIds, SamplingParams
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.output import OutputDelta, OutputState
from server.engine.text.special_names import SpecialNames
from server.engine.text.stop_strings import StopMatcher
from server.engine.text.token_text import TokenTexts
from support.models.tokenizer_zoo import ZOO
from support.stopwatch import quiet_s

CORES = {name: build() for name, build in ZOO.items()}
TABLES = {name: TokenTexts(core) for name, core in CORES.items()}
CORE, TOKEN_TEXTS = CORES["byte_level"], TABLES["byte_level"]
SPECIAL_IDS = {
    id(TABLES[name]): {id_ for id_, token in core.get_added_tokens_decoder().items() if token.special}
    for name, core in CORES.items()
}
EOS = CORE.token_to_id("</s>")


def letters(text: str) -> list[int]:
    """One token per byte."""
    return [CORE.token_to_id("Ġ" if letter == " " else letter) for letter in text]


def state_for(**fields: object) -> OutputState:
    return OutputState(SamplingParams(**{"max_tokens": 1000, **fields}), TOKEN_TEXTS, frozenset({EOS}))


def run(state: OutputState, ids: list[int]) -> tuple[list[str], OutputDelta]:
    deltas = []
    for token_id in ids:
        deltas.append(state.append(token_id))
        if deltas[-1].finish_reason is not None:
            break
    return [delta.text for delta in deltas], deltas[-1]


class Ending(NamedTuple):
    text: str
    num_tokens: int
    reason: str | None
    stop_reason: str | int | None


def ends_with(seen: list[str | int | None], symbols: Sequence[str | int]) -> bool:
    return seen[len(seen) - len(symbols) :] == list(symbols)


def num_shown(token_texts: TokenTexts, stop: str) -> int:
    return sum(type(symbol) is str for symbol in token_texts.symbols(stop))


def at_special_token(
    params: SamplingParams, text: str, broken: str, number: int, stop: str, token_texts: TokenTexts
) -> Ending:
    """A stop string was completed by a special token; `broken` is the rest of an unfinished character before it."""
    for end in range(1, len(broken) + 1):
        earlier = [other for other in params.stop if (text + broken[:end]).endswith(other)]
        if earlier:
            stop, text = max(earlier, key=len), text + broken[:end]
            return Ending(text[: len(text) - len(stop)], number, "stop", stop)
    text += broken
    return Ending(text[: len(text) - num_shown(token_texts, stop)], number, "stop", stop)


def offline(params: SamplingParams, token_texts: TokenTexts, eos_ids: frozenset[int], ids: list[int]) -> Ending:
    """The specification: look at every moment in turn, with the whole text so far in hand."""
    detokenizer, text, seen = (
        Detokenizer(token_texts),
        "",
        [],
    )  # seen: characters and special tokens, None for half a character
    for number, token_id in enumerate(ids, start=1):
        if token_id in SPECIAL_IDS[id(token_texts)]:
            seen += [None, token_id] if detokenizer.is_mid_character else [token_id]
            named = [stop for stop in params.stop if ends_with(seen, token_texts.symbols(stop))]
            stops = named if seen[-1:] == [token_id] else []
            if stops and number > params.min_tokens:
                stop = max(stops, key=len)
                return at_special_token(params, text, detokenizer.flush(), number, stop, token_texts)
        ends_here = number > params.min_tokens and (
            (token_id in eos_ids and not params.ignore_eos) or token_id in params.stop_token_ids
        )
        new = "" if ends_here else detokenizer.append(token_id)
        new += detokenizer.flush() if ends_here or number == params.max_tokens else ""
        for character in new:
            text += character
            seen.append(character)
            lengths = {stop: len(stop) for stop in params.stop if text.endswith(stop)}
            for stop in params.stop:
                if stop not in lengths and ends_with(seen, token_texts.symbols(stop)):
                    lengths[stop] = num_shown(token_texts, stop)
            if lengths and number > params.min_tokens:
                stop = max(lengths, key=len)
                return Ending(text[: len(text) - lengths[stop]], number, "stop", stop)
        if ends_here:
            is_eos = token_id in eos_ids and not params.ignore_eos
            return Ending(text, number, "stop", None if is_eos else token_id)
        if number == params.max_tokens:
            return Ending(text, number, "length", None)
    return Ending(text + detokenizer.flush(), len(ids), None, None)


ALPHABET = {name: [core.encode(part).ids for part in ("ab", "b", "a", " ", "é", "\n", "Ü", "ba b")]
            for name, core in CORES.items()}  # fmt: skip


def stop_strings() -> st.SearchStrategy[str]:
    """Text, and text that names special tokens: whole, in the middle, twice, or cut short."""
    part = st.text("ab \n\ufffdé", max_size=3)
    name = st.sampled_from(["<|user|>", "<|user|>", "<|assistant|>", "</s>", "<|user"])
    mixed = st.lists(st.one_of(part, name), min_size=1, max_size=4).map("".join)
    return st.one_of(st.text("ab \n\ufffdé", min_size=1, max_size=4), mixed.filter(bool))


@st.composite
def sampling_params(draw: st.DrawFn, name: str) -> SamplingParams:
    min_tokens = draw(st.integers(0, 12))
    return SamplingParams(
        max_tokens=min_tokens + draw(st.integers(1, 30)),
        min_tokens=min_tokens,
        stop=tuple(draw(st.lists(stop_strings(), max_size=4))),
        stop_token_ids=tuple(draw(st.lists(st.sampled_from([ids[0] for ids in ALPHABET[name]]), max_size=1))),
        ignore_eos=draw(st.booleans()),
    )


@given(data=st.data(), seed=st.integers(0, 2**32), name=st.sampled_from(["byte_level", "llama2"]))
@settings(max_examples=1500)
def test_streamed_text_is_the_text_cut_offline(data: st.DataObject, seed: int, name: str) -> None:
    params, rng, token_texts = data.draw(sampling_params(name)), random.Random(seed), TABLES[name]
    eos = CORES[name].token_to_id("</s>")
    choices = ALPHABET[name] + ([[eos]] if rng.random() < 0.3 else [])
    if rng.random() < 0.6:
        choices = choices + [[CORES[name].token_to_id(special)] for special in ("<|user|>", "<|assistant|>")]
    ids = [id_ for _ in range(40) for id_ in rng.choice(choices)]
    ids = [id_ for id_ in ids if rng.random() < 0.9]  # dropped bytes leave broken characters
    expected = offline(params, token_texts, frozenset({eos}), ids)
    state = OutputState(params, token_texts, frozenset({eos}))
    texts, last = run(state, ids)
    if last.finish_reason is None:
        texts.append(state.finish("length").text)
    assert Ending("".join(texts), state.num_tokens, last.finish_reason, last.stop_reason) == expected
    for count in range(len(texts)):  # what was shown at any moment is a beginning of the end result: nothing leaked
        assert expected.text.startswith("".join(texts[:count]))


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5),
       cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30))  # fmt: skip
@settings(max_examples=500)
def test_matches_and_hold_back_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher, position, found = StopMatcher(stops), 0, None
    for cut in cuts:
        found = matcher.feed(text[position : position + cut], may_match=True)
        if found:
            break
        position = min(position + cut, len(text))
        seen = text[:position]
        openings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        assert matcher.num_open == max((len(opening) for opening in openings if seen.endswith(opening)), default=0)
    ends = [(end, -len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    assert (found is None) == (not ends)
    if found:
        assert (position + found.end, -len(found.stop)) == min(ends)


def test_a_stop_string_over_several_tokens_never_shows_its_beginning() -> None:
    texts, last = run(state_for(stop=("END",)), letters("the EN EENDx"))
    assert texts == ["t", "h", "e", " ", "", "", "EN ", "", "E", "", ""]
    assert last == OutputDelta("", "stop", "END")


def test_the_stop_string_that_completes_first_wins_whatever_its_place_in_the_list() -> None:
    for stops in (("abcdef", "cd"), ("cd", "abcdef")):
        texts, last = run(state_for(stop=stops), letters("xabcdef"))
        assert ("".join(texts), last.stop_reason) == ("xab", "cd")


def test_of_two_stop_strings_with_one_end_the_longer_wins() -> None:
    assert run(state_for(stop=("c", "abc")), letters("xabc"))[1].stop_reason == "abc"


def test_held_back_text_is_released_at_the_end_of_sequence_and_at_the_limit() -> None:
    assert run(state_for(stop=("END",)), [*letters("aEN"), EOS])[1] == OutputDelta("EN", "stop", None)
    assert run(state_for(stop=("END",), max_tokens=3), letters("aEN"))[1] == OutputDelta("EN", "length", None)
    state = state_for(stop=("END",))
    run(state, letters("aEN"))
    assert state.finish("abort") == OutputDelta("EN", "abort", None)


def test_half_a_character_at_the_limit_is_shown_as_broken() -> None:
    lead = CORE.token_to_id("ð")
    assert run(state_for(max_tokens=2), [*letters("a"), lead])[1] == OutputDelta("\ufffd", "length", None)


def test_end_tokens_end_and_are_no_text() -> None:
    token = letters("x")[0]
    texts, last = run(state_for(), [*letters("ab"), EOS, *letters("c")])
    assert ("".join(texts), last[1:3]) == ("ab", ("stop", None))
    texts, last = run(state_for(stop_token_ids=(token,)), letters("abxc"))
    assert ("".join(texts), last[1:3]) == ("ab", ("stop", token))
    texts, last = run(state_for(stop=("bx",)), letters("abxc"))
    assert ("".join(texts), last[1:3]) == ("a", ("stop", "bx"))


def special(name: str) -> int:
    return CORE.token_to_id(name)


@pytest.mark.parametrize(
    ("stop", "ids", "text"),
    [
        ("<|user|>", [*letters("ab"), special("<|user|>"), *letters("c")], "ab"),
        ("<|user|>", letters("ab<|user|>c"), "ab"),  # written out
        ("b<|user|>", [*letters("ab"), special("<|user|>")], "a"),
        ("<|user|>b", [*letters("a"), special("<|user|>"), *letters("bc")], "a"),
        (
            "b<|user|>c<|assistant|>",
            [*letters("ab"), special("<|user|>"), *letters("c"), special("<|assistant|>")],
            "a",
        ),
        ("</s>", [*letters("ab"), EOS], "ab"),
        ("b</s>", [*letters("ab"), EOS], "a"),
        ("<|user|>", [*letters("a"), special("ð"), special("<|user|>")], "a\ufffd"),
    ],
)
def test_a_stop_string_that_names_a_special_token_matches_the_token(stop: str, ids: list[int], text: str) -> None:
    texts, last = run(state_for(stop=(stop,)), ids)
    assert ("".join(texts), last.finish_reason, last.stop_reason) == (text, "stop", stop)


def test_a_special_token_that_no_stop_string_names_changes_nothing() -> None:
    other, user = special("<|assistant|>"), special("<|user|>")
    assert run(state_for(stop=("ab",)), [*letters("xa"), other, *letters("b")])[1].stop_reason == "ab"
    texts, last = run(state_for(stop=("a<|user|>",)), [*letters("xa"), other, user, *letters("b")])
    assert ("".join(texts), last.finish_reason) == ("xab", None)


def test_the_beginning_of_a_stop_string_is_held_back_over_a_special_token() -> None:
    texts, _ = run(state_for(stop=("a<|user|>bc",)), [*letters("xa"), special("<|user|>"), *letters("bd")])
    assert texts == ["x", "", "", "", "abd"]


def test_stop_strings_that_repeat_the_beginning_of_a_name_are_read_in_linear_time() -> None:
    names = SpecialNames({number: f"<|reserved_special_token_{number}|>" for number in range(6000)})
    counted = CountedText("<|reserved_special_token_" * 40)
    assert len(names.symbols(counted)) == len(counted)
    assert counted.num_reads < 8 * len(counted)


class CountedText(str):
    num_reads = 0

    def __getitem__(self, key: Any) -> str:
        self.num_reads += 1
        return super().__getitem__(key)


def test_ignore_eos_runs_to_the_limit() -> None:
    texts, last = run(state_for(ignore_eos=True, max_tokens=4), [*letters("a"), EOS, *letters("bcd")])
    assert ("".join(texts), last.finish_reason) == ("abc", "length")


def test_the_first_min_tokens_tokens_cannot_stop_it() -> None:
    fields = {"min_tokens": 3, "stop": ("b",), "stop_token_ids": (CORE.token_to_id("c"),)}
    assert "".join(run(state_for(**fields), [*letters("bc"), EOS, *letters("ab")])[0]) == "bca"
    assert "".join(run(state_for(**fields), letters("abac"))[0]) == "aba"
    assert "".join(run(state_for(min_tokens=2, stop=("abc",)), letters("abc"))[0]) == ""  # began early, ends late
    assert "".join(run(state_for(min_tokens=3, stop=("aba",)), letters("ababa"))[0]) == "ab"  # overlaps one passed over


def test_a_token_costs_little_and_the_worst_stop_strings_stay_linear() -> None:
    ids = letters("the tenant may end the lease ") * 40
    assert _microseconds_per_token(state_for(max_tokens=10_000), ids) < 15
    worst = tuple("a" * (1000 + index) + "b" for index in range(16))
    assert _microseconds_per_token(state_for(max_tokens=10_000, stop=worst), letters("a") * 3000) < 150


def _microseconds_per_token(state: OutputState, ids: list[int]) -> float:
    return quiet_s(lambda: [state.append(token_id) for token_id in ids], tries=1) / len(ids) * 1e6


@pytest.mark.parametrize(
    ("is_open", "text", "expected"),
    [
        (True, "so>yes", 3),
        (True, ">yes", 1),
        (True, "so", 2),
        (True, "<so>yes>", 4),
        (False, "<so>yes", 4),
        (False, "<so", 3),
        (False, "<>yes<so>", 2),
        (False, "so>yes<so>", 0),
    ],
)
@pytest.mark.parametrize("stop", [(), ("yes",)])
def test_reasonings_tokens_are_counted_with_their_marks(
    *, is_open: bool, text: str, expected: int, stop: tuple[str, ...]
) -> None:
    """Also of text that is held back, and not past the mark that closes it."""
    opens, closes = letters("<>")
    state = state_for(stop=stop, reasoning=ReasoningIds(None if is_open else opens, closes))
    run(state, letters(text))
    assert state.num_reasoning_tokens == expected


def test_a_token_without_text_before_the_reasoning_is_not_counted() -> None:
    opens, closes = letters("<>")
    state = state_for(ignore_eos=True, mark_ids={opens, closes}, reasoning=ReasoningIds(opens, closes))
    run(state, [EOS, *letters("<so>yes")])
    assert state.num_reasoning_tokens == 4
