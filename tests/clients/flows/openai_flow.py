"""What openai-python does with a chat server: models, chat, streams, completions, logprobs, errors, many at once."""

from __future__ import annotations

import asyncio
import json
import os
import time

import openai

URL, KEY, MODEL, BASE = (os.environ[name] for name in ("CLIENT_URL", "CLIENT_KEY", "CLIENT_MODEL", "CLIENT_BASE"))
QUESTION = [{"role": "user", "content": "What should I avoid when I sign a contract?"}]


def one_client() -> None:
    client = openai.OpenAI(base_url=URL, api_key=KEY)
    assert {model.id for model in client.models.list()} == {BASE, MODEL}
    assert client.models.retrieve(MODEL).owned_by
    whole = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, temperature=0, user="u1")
    assert whole.headers["x-multilora-adapter-version"] == f"{MODEL}@1"
    answer = whole.parse()
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.completion_tokens > 0
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == text
    several = client.completions.create(
        model=MODEL, prompt=["Hello", "Good"], n=2, max_tokens=4, logprobs=2, echo=True, seed=1
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].logprobs.token_logprobs[0] is None
    limited = client.chat.completions.create(
        model=MODEL, messages=QUESTION, logprobs=True, top_logprobs=3, max_completion_tokens=3
    )
    assert len(limited.choices[0].logprobs.content[0].top_logprobs) == 3
    assert limited.choices[0].finish_reason == "length"


def replayed_and_stopped() -> None:
    """A client replays what it got, nulls and all; stops at a special token; sends what other servers take."""
    client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
    greedy = {"model": MODEL, "messages": QUESTION, "max_tokens": 200, "top_p": 0}
    whole = client.chat.completions.create(**greedy, extra_body={"ignore_eos": True})
    stopped = client.chat.completions.create(**greedy, stop=["<|end_of_turn|>"], extra_body={"ignore_eos": True})
    assert stopped.choices[0].finish_reason == "stop"
    text = whole.choices[0].message.content
    assert text.startswith(stopped.choices[0].message.content)
    assert whole.usage.completion_tokens == 200 > stopped.usage.completion_tokens
    replayed = stopped.choices[0].message.model_copy(update={"content": None}).model_dump()
    client.chat.completions.create(model=MODEL, messages=[*QUESTION, replayed, *QUESTION], max_tokens=2)
    begun = {"role": "assistant", "content": stopped.choices[0].message.content[:9]}
    extra = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}}
    longer = client.chat.completions.create(
        model=MODEL, messages=[*QUESTION, begun], max_tokens=5, temperature=0, extra_body=extra
    )
    assert longer.choices[0].message.content


def refusals() -> None:
    client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
    for error, key, fields in (
        (openai.NotFoundError, KEY, {"model": "nobody's"}),
        (openai.BadRequestError, KEY, {"model": MODEL, "temperature": 9}),
        (openai.AuthenticationError, "ml-wrong", {"model": MODEL}),
    ):
        refused = refusal_of(client.with_options(api_key=key), fields)
        assert isinstance(refused, error), refused
        assert refused.code, refused


def refusal_of(client: openai.OpenAI, fields: dict[str, object]) -> openai.APIStatusError:
    try:
        client.chat.completions.create(messages=QUESTION, **fields)
    except openai.APIStatusError as error:
        return error
    raise AssertionError(f"{fields} was answered")


def responses() -> None:
    client = openai.OpenAI(base_url=URL, api_key=KEY)
    fields = {"model": MODEL, "input": "Who pays for repairs?", "temperature": 0, "max_output_tokens": 40}
    whole = client.responses.create(**fields)
    assert whole.output_text
    with client.responses.stream(**fields) as stream:
        assert stream.until_done().get_final_response().output_text == whole.output_text


def embeddings() -> None:
    """The client asks for base64 and decodes it itself."""
    client = openai.OpenAI(base_url=URL, api_key=KEY)
    own, base = (client.embeddings.create(model=model, input=["A lease", "A rent"]) for model in (MODEL, BASE))
    for answer in (own, base):
        lengths = [sum(number * number for number in entry.embedding) for entry in answer.data]
        assert all(abs(length - 1) < 1e-3 for length in lengths), lengths
    assert own.data[0].embedding != base.data[0].embedding
    assert own.usage.total_tokens == own.usage.prompt_tokens > 0
    assert len(client.embeddings.create(model=MODEL, input="A lease", dimensions=8).data[0].embedding) == 8


def batches() -> None:
    """A file of chats, one of them for a model that does not exist; answered in the background, read back by id."""
    client = openai.OpenAI(base_url=URL, api_key=KEY)
    bodies = [{"model": model, "messages": QUESTION, "max_tokens": 8, "temperature": 0} for model in (MODEL, "none")]
    lines = [
        {"custom_id": body["model"], "method": "POST", "url": "/v1/chat/completions", "body": body} for body in bodies
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("night.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"night": "1"}
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    [good], [bad] = (
        [json.loads(line) for line in client.files.content(id_).text.splitlines()]
        for id_ in (batch.output_file_id, batch.error_file_id)
    )
    live = client.chat.completions.create(**bodies[0])
    assert good["custom_id"] == MODEL
    assert good["response"]["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("none", 404)
    assert batch.id in {each.id for each in client.batches.list()}


async def many_at_once() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=20)
                for model in (BASE, MODEL) * 8
            )
        )
    assert len({answer.choices[0].message.content for answer in answers}) == 2


one_client()
replayed_and_stopped()
refusals()
responses()
embeddings()
batches()
asyncio.run(many_at_once())
print("models, chat, stream, completions, logprobs, errors, responses, embeddings, batches, 16 at once")
