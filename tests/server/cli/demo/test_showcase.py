"""The demo's story on a tiny random base: who is introduced, who answers, and what is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.store import AdapterStore
from server.demo.showcase import ADAPTER_NAME, Answer, Round, Showcase, ShowcaseFailed, Voice, introduce, summary_of
from server.engine.request import InvalidRequest
from server.engine.startup.build import EngineParts
from support.servers.keys import owner_of
from support.servers.service import Service, running


@pytest.fixture(scope="module")
def service(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(base, {}, tmp_path_factory.mktemp("showcase")) as service:
        yield service


@pytest.fixture(scope="module")
def parts(service: Service) -> EngineParts:
    return service.parts


@pytest.fixture(scope="module")
def store(service: Service) -> AdapterStore:
    return service.store


@pytest.fixture(scope="module")
def voices(store: AdapterStore, parts: EngineParts, adapters: dict[str, Path]) -> list[Voice]:
    return introduce(store, parts.base.description, adapters)


def play(parts: EngineParts, voices: list[Voice], prompt: str = "Tell me a joke.", max_tokens: int = 24) -> Round:
    return deque(Showcase(parts, voices, max_tokens=max_tokens).ask(prompt), maxlen=1).pop()


def test_every_tenant_comes_with_a_key_and_an_adapter_of_the_same_name(
    voices: list[Voice], store: AdapterStore
) -> None:
    assert [voice.name for voice in voices] == ["base", "law", "med", "code"]
    assert voices[0].adapter is None
    for voice in voices[1:]:
        assert voice.api_key is not None
        assert owner_of(store, voice.api_key) == voice.name
        assert store.resolve(voice.name, ADAPTER_NAME).digest == voice.adapter


def test_each_voice_answers_as_it_would_alone(parts: EngineParts, voices: list[Voice]) -> None:
    together = play(parts, voices)
    alone = {voice.name: play(parts, [voice]).answers[voice.name].text for voice in voices}
    assert {name: answer.text for name, answer in together.answers.items()} == alone
    assert len(set(alone.values())) == 4


def test_the_four_share_batches_and_the_count_is_measured(parts: EngineParts, voices: list[Voice]) -> None:
    this = play(parts, voices, "Name three rivers.", max_tokens=40)  # no earlier answer says what follows
    assert max(this.rows_per_step) == 4
    assert sum(this.rows_per_step) == this.num_tokens  # each row of a step that says something says one token
    assert max(play(parts, voices[:1]).rows_per_step) == 1


def test_tokens_that_a_draft_gave_at_once_are_one_row(parts: EngineParts, voices: list[Voice]) -> None:
    this = play(parts, voices[:1], "again and " * 30, max_tokens=120)
    assert len(this.rows_per_step) < this.num_tokens, "prompt lookup gave several tokens in a step"
    assert max(this.rows_per_step) == 1


def test_a_round_grows_before_it_is_complete(parts: EngineParts, voices: list[Voice]) -> None:
    counts = [this.num_tokens for this in Showcase(parts, voices, max_tokens=200).ask("Tell me about cats.")]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3


def test_a_kept_data_directory_gets_new_keys_and_no_new_versions(
    parts: EngineParts, store: AdapterStore, voices: list[Voice], adapters: dict[str, Path]
) -> None:
    again = introduce(store, parts.base.description, {"law": adapters["law"]})[1]
    assert again.api_key is not None
    assert owner_of(store, again.api_key) == "law"
    assert again.adapter == voices[1].adapter
    assert len(store.versions("law", ADAPTER_NAME)) == 1


def test_a_prompt_that_does_not_fit_is_refused(parts: EngineParts, voices: list[Voice]) -> None:
    with pytest.raises(InvalidRequest):
        play(parts, voices, prompt="tell me " * 2000)


def test_an_adapter_that_is_gone_fails_the_showcase_by_name(parts: EngineParts, store: AdapterStore) -> None:
    from adapters_store.base.description import AdapterDigest

    ghost = Voice("ghost", AdapterDigest("sha256:" + "0" * 64), "key")
    with pytest.raises(ShowcaseFailed, match="ghost could not answer"):
        play(parts, [Voice("base"), ghost])


def test_a_summary_counts_all_rounds() -> None:
    first = Round("a", {"base": Answer("x", 3, True), "law": Answer("y", 2, True)}, [2, 2, 1], 0.5)
    second = Round("b", {"base": Answer("x", 1, True)}, [1], 1.5)
    summary = summary_of([first, second])
    assert (summary.num_tokens, summary.duration_s) == (6, 2.0)
    assert (summary.num_steps, summary.shared_steps, summary.max_rows) == (4, 2, 2)
    assert summary.tokens_per_s == 3.0
