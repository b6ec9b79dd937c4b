"""The stock openai client, unchanged, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from server.engine.request import RequestError
from support.worlds.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def say(ai: openai.OpenAI) -> Callable[..., object]:
    def chat(**changes: object) -> object:
        return ai.chat.completions.create(**{"model": "tiny", "messages": HELLO, "temperature": 0, **changes})  # type: ignore[call-overload]

    return chat


def test_chat_and_its_stream_say_the_same(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="tiny", messages=HELLO, temperature=0)  # type: ignore[arg-type]
    stream = ai.chat.completions.create(
        model="tiny",
        messages=HELLO,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_assembles_the_message(ai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0}
    free = ai.chat.completions.create(**ask, max_tokens=30).choices[0].message.content or ""
    ask["stop"] = [letter for letter in free[5:] if letter.isascii() and letter.isalpha()][:1]
    with ai.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion()
    whole = ai.chat.completions.create(**ask)
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_chat_logprobs_parse(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="tiny",
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content or ()) == 3


def test_completions_with_echo_and_logprobs_parse(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model="tiny", prompt=["a b", "c"], echo=True, logprobs=1, max_tokens=1, seed=1)
    assert [choice.text[:1] for choice in answer.choices] == ["a", "c"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.token_logprobs or [0])[0] is None


def test_the_fields_beyond_openais_go_as_extra_body(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(
        model="tiny", prompt="hi", max_tokens=30, extra_body={"ignore_eos": True, "top_k": 1, "min_tokens": 3}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30


def test_a_replayed_answer_without_content_and_top_p_0_pass(ai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "top_p": 0, "temperature": 1}
    answer = ai.chat.completions.create(**ask, messages=HELLO, stop=["<|assistant|>", "</s>"]).choices[0].message
    answer.content = None
    replayed = [*HELLO, answer.model_dump(), answer.to_dict(), *HELLO]
    again = [ai.chat.completions.create(**ask, messages=replayed).choices[0].message for _ in range(2)]
    assert again[0] == again[1]


def test_models_are_listed_and_retrieved(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny"]
    assert ai.models.retrieve("tiny").owned_by == "base"


def test_an_adapter_is_a_model(ai: openai.OpenAI, client: httpx.Client, upload: Callable[..., httpx.Response]) -> None:
    upload(client, "ft:tiny:acme:law:1")
    answer = ai.completions.create(model="ft:tiny:acme:law:1", prompt="hello", max_tokens=20, temperature=0)
    base = ai.completions.create(model="tiny", prompt="hello", max_tokens=20, temperature=0)
    assert answer.choices[0].text != base.choices[0].text
    assert ai.models.retrieve("ft:tiny:acme:law:1").owned_by == "acme"
    client.delete("/v1/adapters/ft:tiny:acme:law:1")


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f f"}}]}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"frobnicate": 1}}, openai.BadRequestError, "unknown_parameter"),
        ({"extra_headers": {"X-Tenant-Id": "globex"}}, openai.PermissionDeniedError, "tenant_mismatch"),
        ({"extra_headers": {"Authorization": "Bearer no"}}, openai.AuthenticationError, "invalid_api_key"),
    ],
)
def test_refusals_are_the_clients_own_exceptions(
    say: Callable[..., object], changes: dict[str, object], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as refused:
        say(**changes)
    assert refused.value.code == code
    assert refused.value.request_id


def test_overload_is_a_rate_limit_error_that_the_client_retries_away(
    ai: openai.OpenAI, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_engine.max_waiting = 0
    with pytest.raises(openai.RateLimitError) as refused:
        ai.completions.create(model="tiny", prompt="x")
    assert refused.value.response.headers["retry-after"] == "2"
    waits: list[float] = []

    def room_again(seconds: float) -> None:
        waits.append(seconds)
        fake_engine.max_waiting = 256

    monkeypatch.setattr(openai.OpenAI, "_sleep_for_retry", lambda self, **kw: room_again(2.0), raising=True)
    answer = ai.with_options(max_retries=2).completions.create(model="tiny", prompt="x", max_tokens=1)
    assert len(answer.choices) == 1
    assert len(waits) == 1


def test_a_damaged_adapter_is_an_internal_error_and_not_retried(ai: openai.OpenAI, fake_engine: FakeEngine) -> None:
    fake_engine.fail_next(RequestError("nan_logits", "the model produced NaN", 500))
    num_before = len(fake_engine.seen)
    with pytest.raises(openai.InternalServerError):
        ai.with_options(max_retries=3).completions.create(model="tiny", prompt="x")
    assert len(fake_engine.seen) == num_before + 1


def test_a_stream_that_breaks_raises(ai: openai.OpenAI, fake_engine: FakeEngine) -> None:
    fake_engine.fail_next(RequestError("nan_logits", "the model produced NaN", 500), after_tokens=2)
    stream = ai.completions.create(model="tiny", prompt="hello", max_tokens=20, stream=True)
    with pytest.raises(openai.APIError, match="the model produced NaN"):
        list(stream)


def test_the_async_client_streams_many_at_once(ai: openai.OpenAI, url: str, keys: dict[str, str]) -> None:
    prompts = [f"number {number}" for number in range(16)]
    alone = [
        ai.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=30).choices[0].text
        for prompt in prompts
    ]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=30, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=keys["acme"]) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(scenario()) == alone
    assert len(set(alone)) == 16
