"""Embeddings are the hidden states of transformers and PEFT, for every family, in any batch, cut anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig

from server.engine.model.base_model import load_base
from server.engine.request import Pooling, Request, SamplingParams
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings
from support.models.models import (
    FAMILY_NAMES,
    MORE_FAMILY_NAMES,
    VOCAB,
    linear_names,
    peft_model,
    save_adapter,
    save_base,
)
from support.models.packed_forward import PackedForward
from support.servers.service import Service, make_base, running

Vector = NDArray[np.float32]
# A norm scaled in its own way, keys that change with the length, logits that are scaled behind the head, other names.
SHORT = ("gemma3", "phi3-longrope", "granite", "gpt-neox")
FAMILIES = (*FAMILY_NAMES, *MORE_FAMILY_NAMES) if os.environ.get("MULTILORA_ALL_FAMILIES") else SHORT
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def oracle(base: Path, adapter: Path | None) -> Callable[[list[int], Pooling], Vector]:
    """What the head reads, pooled by hand."""
    model: Any = peft_model(base, adapter)

    def embed(tokens: list[int], pooling: Pooling) -> Vector:
        with torch.inference_mode():
            hidden_TH = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].float()
        pooled: Vector = (hidden_TH[-1] if pooling == "last" else hidden_TH.mean(0)).numpy()
        return pooled

    return embed


def with_adapter(base: Path, folder: Path) -> Path:
    names = linear_names(peft_model(base, None))
    return save_adapter(base, folder, LoraConfig(r=4, lora_alpha=8, target_modules=names), seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_family_gives_the_hidden_states_of_peft(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    adapter = with_adapter(base, tmp_path / "adapter")
    expected = {None: oracle(base, None), 0: oracle(base, adapter)}
    forward = PackedForward(load_base(base, dtype="float32"), [adapter], num_sequences=5)
    slots: list[int | None] = [0, None, 0, None, 0]
    requests = [forward.request(n, ids, slots[n]) for n, ids in enumerate(prompts((1, 31, 50, 7, 33)))]
    for number, request in enumerate(requests):  # the last one asks for no vector
        pooling = None if number == 4 else POOLINGS[number % 2]
        request.params = SamplingParams(max_tokens=0, pooling=pooling)
    found = in_chunks(forward, requests, 16)
    assert found.keys() == {"0", "1", "2", "3"}
    for number, request in enumerate(requests[:4]):
        pooling = request.params.pooling
        assert pooling is not None
        assert np.abs(found[request.id] - expected[slots[number]](request.prompt_ids, pooling)).max() <= 1e-4


def in_chunks(forward: PackedForward, requests: list[Request], count: int) -> dict[str, Vector]:
    """Forwards of at most `count` tokens of each request; each one twice, as after a failure."""
    found: dict[str, Vector] = {}
    while alive := [request for request in requests if request.num_computed_tokens < request.num_tokens]:
        rows = [
            ScheduledRow(each, each.num_computed_tokens, min(count, each.num_tokens - each.num_computed_tokens))
            for each in alive
        ]
        schedule = Schedule(rows, sum(row.num_tokens for row in rows), 0)
        first, again = forward.runner.run(schedule), forward.runner.run(schedule)
        assert all(np.array_equal(first.embeddings[id_], again.embeddings[id_]) for id_ in first.embeddings)
        found |= first.embeddings
        for row in rows:
            row.request.num_computed_tokens += row.num_tokens
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def service(base: Path, adapter: Path, tmp_path: Path) -> Iterator[Service]:
    scheduler = SchedulerSettings(max_batch_tokens=48, max_running=16, prompt_lookup=0)
    with running(base, {"own": adapter}, tmp_path / "data", scheduler=scheduler) as service:
        yield service


def test_embeddings_and_answers_share_batches_and_each_gets_what_it_gets_alone(
    service: Service, base: Path, adapter: Path
) -> None:
    inputs, [question] = prompts((40, 33, 60, 9, 50, 1), seed=2), prompts((20,), seed=3)
    names = [None, "own", "own", None, "own", "own"]
    alone = service.tokens(question, "own", max_tokens=24)
    steps = service.stats().counters["steps"]
    with service.held():
        answer = service.ask(question, "own", max_tokens=24)[1]
        vectors = [service.ask(ids, names[n], max_tokens=0, pooling=POOLINGS[n % 2])[1] for n, ids in enumerate(inputs)]
    assert answer.tokens() == alone
    expected = {None: oracle(base, None), "own": oracle(base, adapter)}
    for number, vector in enumerate(vectors):
        last = vector.collect()[-1]
        assert last.finish_reason == "length"
        assert last.embedding is not None
        wanted = expected[names[number]](inputs[number], POOLINGS[number % 2])
        assert np.abs(last.embedding - wanted).max() <= 1e-4
    assert service.stats().counters["steps"] - steps == 24, "the answer's steps carried every prompt"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_blocks_of_an_embedded_prompt_are_read_again(
    service: Service, base: Path, adapter: Path, pooling: Pooling
) -> None:
    [ids] = prompts((45,), seed=6)
    service.ask(ids, "own", max_tokens=0, pooling=pooling)[1].collect()
    last = service.ask(ids, "own", max_tokens=0, pooling="last")[1].collect()[-1]
    assert last.num_cached_tokens == 40
    assert last.embedding is not None
    assert np.abs(last.embedding - oracle(base, adapter)(ids, "last")).max() <= 1e-4


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_cached_prefix_changes_no_vector(service: Service, base: Path, adapter: Path, pooling: Pooling) -> None:
    [ids] = prompts((45,), seed=4)
    service.tokens(ids, "own", max_tokens=1)
    last = service.ask(ids, "own", max_tokens=0, pooling=pooling)[1].collect()[-1]
    assert last.embedding is not None
    assert np.abs(last.embedding - oracle(base, adapter)(ids, pooling)).max() <= 1e-4
    assert (last.num_cached_tokens > 0) == (pooling == "last")
