"""An activated LoRA (aLoRA) has PEFT's logits at every position, in a mixed batch and however the prompt is cut, and
its tenant's base requests share the keys and values of what stands before it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from adapters_store.base.description import AdapterDigest
from adapters_store.format.invocation import last_place
from server.engine.model.base_model import load_base
from server.engine.request import Request, SamplingParams
from server.engine.scheduling.prefix_cache import PrefixCache
from support.models.models import VOCAB, peft_model, save_adapter, save_base
from support.models.packed_forward import PackedForward
from support.servers.service import make_base, running

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [7, 3]
BLOCK = 8


def activated(rank: int, targets: list[str], invocation: list[int]) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=invocation
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two activated ones, the second on the head too, and an ordinary one."""
    root = tmp_path_factory.mktemp("adapters")
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM")
    configs = [activated(4, ALL, INVOCATION), activated(2, ["q_proj", "lm_head"], [5]), plain]
    return [save_adapter(base, root / str(index), config, seed=index) for index, config in enumerate(configs)]


def tokens(length: int, *places: int, invocation: list[int], seed: int) -> list[int]:
    """Random ids above the invocation's, which stands at `places` alone."""
    generator = random.Random(seed)
    ids = [generator.randrange(10, VOCAB) for _ in range(length)]
    for place in places:
        ids[place : place + len(invocation)] = invocation
    return ids


ROWS = [  # (adapter, prompt): the invocation first, in a block, at a block's edge, across one, last, twice
    *((0, tokens(29, place, invocation=INVOCATION, seed=place)) for place in (0, 5, BLOCK, BLOCK - 1, 27)),
    (0, tokens(29, 3, 18, invocation=INVOCATION, seed=91)),
    (1, tokens(20, 11, invocation=[5], seed=92)),
    (2, tokens(20, 11, invocation=[5], seed=93)),
    (None, tokens(20, 11, invocation=INVOCATION, seed=94)),
]


def requests(forward: PackedForward) -> list[Request]:
    made = []
    for index, (slot, prompt) in enumerate(ROWS):
        request = forward.request(index, prompt, slot)
        if slot in (0, 1):
            request.active_from = last_place(prompt, [INVOCATION, [5]][slot]) or 0
        made.append(request)
    return made


def test_every_position_of_a_mixed_batch_has_pefts_logits_however_prompts_are_cut(
    base: Path, adapters: list[Path]
) -> None:
    models = {None: peft_model(base, None), **{slot: peft_model(base, path) for slot, path in enumerate(adapters)}}
    with torch.inference_mode():
        expected = [models[slot](input_ids=torch.tensor([prompt])).logits[0] for slot, prompt in ROWS]
        bare = [models[None](input_ids=torch.tensor([prompt])).logits[0] for _, prompt in ROWS]
    served = load_base(base, dtype="float32")
    for chunk in (64, 7, 1):
        forward = PackedForward(served, adapters)
        rows = requests(forward)
        pieces: list[list[torch.Tensor]] = [[] for _ in rows]
        while left := [index for index, row in enumerate(rows) if row.num_computed_tokens < row.num_tokens]:
            counts = [min(chunk, row.num_tokens - row.num_computed_tokens) for row in rows]
            for index, got in zip(left, forward.logits(rows, counts), strict=True):
                pieces[index].append(got)
        for (slot, _), row, got, wanted, without in zip(ROWS, rows, pieces, expected, bare, strict=True):
            assert (torch.cat(got) - wanted).abs().max() <= 1e-4
            if slot is not None:
                changed = (torch.cat(got) - without).abs().amax(dim=1) > 1e-3
                assert not changed[: row.active_from].any()
                assert changed[row.active_from :].all()


def test_blocks_have_one_name_exactly_if_the_same_rows_ran_on_the_same_tokens() -> None:
    """Prompts of two tenants, two adapters and the base, invoked anywhere: no two contents meet in a name, and what ran
    without an adapter is the base's."""
    cache, generator = PrefixCache("sha256:base", 4), random.Random(3)
    content_of: dict[bytes, object] = {}
    name_of: dict[object, bytes] = {}
    num_shared = 0
    for index in range(3000):
        prompt = [generator.randrange(2) for _ in range(generator.randrange(4, 25))]
        adapter = generator.choice([None, AdapterDigest("sha256:a"), AdapterDigest("sha256:b")])
        request = Request(str(index), generator.choice("xy"), prompt, SamplingParams(), adapter=adapter)
        request.active_from = 0 if adapter is None else generator.randrange(len(prompt))
        for block in range(len(prompt) // 4):
            end = (block + 1) * 4
            ran = None if adapter is None or end <= request.active_from else (adapter, request.active_from)
            content = (request.tenant, tuple(prompt[:end]), ran)
            name = cache.name(request, block)
            num_shared += content in name_of
            assert content_of.setdefault(name, content) == content
            assert name_of.setdefault(content, name) == name
    assert num_shared > 1000


def test_a_call_after_a_base_conversation_computes_its_own_tokens_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    invocation = [40, 41]
    folder = save_adapter(base, tmp_path / "a", activated(4, ALL, invocation), seed=1)
    plain = save_adapter(
        base, tmp_path / "p", replace(activated(4, ALL, invocation), alora_invocation_tokens=None), seed=1
    )
    oracle = peft_model(base, folder)
    conversation = tokens(61, invocation=invocation, seed=7)
    prompt = [*conversation, *invocation, 50, 51, 52]
    with running(base, {"judge": folder, "plain": plain}, tmp_path / "data", block_size=BLOCK) as service:
        version = service.versions["judge"]
        assert version.invocation_tokens == (40, 41)
        service.tokens(conversation, max_tokens=1)
        cached = {}
        for adapter in ("judge", "plain"):
            _, answer = service.ask(prompt, adapter, active_from=61 if adapter == "judge" else 0, max_tokens=8)
            events = answer.collect()
            cached[adapter] = events[-1].num_cached_tokens
            got = [token for event in events for token in event.token_ids]
            if adapter == "judge":
                ids = list(prompt)
                for _ in range(8):
                    with torch.inference_mode():
                        offsets = [len(ids) - 61]
                        logits = oracle(input_ids=torch.tensor([ids]), alora_offsets=offsets).logits[0, -1]
                    ids.append(int(logits[:418].argmax()))
                assert got == ids[len(prompt) :]
        assert cached == {"judge": 61 // BLOCK * BLOCK, "plain": 0}
        _, again = service.ask(prompt, "judge", active_from=61, max_tokens=1)
        assert again.collect()[-1].num_cached_tokens == len(prompt) // BLOCK * BLOCK
        service.worker.forget_adapters([version.digest])
        _, base_again = service.ask([*conversation, 60], max_tokens=1)
        assert (
            base_again.collect()[-1].num_cached_tokens == 61 // BLOCK * BLOCK
        )  # the base's blocks outlive the adapter


def test_its_embeddings_are_pefts_hidden_states_also_after_the_bases_cached_conversation(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    invocation = [40, 41]
    folder = save_adapter(base, tmp_path / "a", activated(4, ALL, invocation), seed=1)
    conversation = tokens(29, invocation=invocation, seed=8)
    prompt = [*conversation, *invocation, 50, 51]
    with torch.inference_mode():
        states = [
            peft_model(base, path)(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
            for path in (folder, None)
        ]
    with running(base, {"judge": folder}, tmp_path / "data", block_size=BLOCK) as service:
        service.tokens(conversation, max_tokens=1)
        for pooling, hidden_TH in (("last", states[0][-1]), ("mean", states[0].mean(0))):
            [event] = service.ask(prompt, "judge", active_from=29, max_tokens=0, pooling=pooling)[1].collect()
            assert event.num_cached_tokens == (29 // BLOCK * BLOCK if pooling == "last" else 0)
            assert event.embedding is not None
            assert abs(event.embedding - hidden_TH.numpy()).max() <= 1e-4
    assert (states[0] - states[1])[29:].abs().amax(dim=1).min() > 1e-3, "the adapter changes what it should"


@pytest.mark.parametrize(
    ("prompt", "wanted", "place"),
    [
        ([1, 2, 3, 1, 2], [1, 2], 3),
        ([1, 2, 3], [1, 2], 0),
        ([1, 1, 1], [1, 1], 1),
        ([1, 256, 1], [0, 1], None),
        ([0x01000000, 0x00000001], [0x00000100], None),  # found between two ids' bytes only
        ([3], [3, 4], None),
    ],
)
def test_the_last_place_of_the_tokens(prompt: list[int], wanted: list[int], place: int | None) -> None:
    assert last_place(prompt, wanted) == place
