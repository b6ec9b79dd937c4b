"""Several adapters in one request: the logits and tokens of PEFT's `add_weighted_adapter`, and one more adapter to all
that keeps adapters."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import NotCombinable
from adapters_store.format.chat_fields import DTYPE_FIELD
from adapters_store.packed import mix as mix_module
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.mix import Part, has_part, mix_of, parts_of
from adapters_store.packed.mixing import mixed
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.versions.records import AdapterVersion
from lora_kernels.background import TimeSlices
from server.engine.model.base_model import BaseModel, load_base
from server.engine.startup.settings import MemoryBudget
from support.models import random_peft
from support.models.models import VOCAB, peft_model, save_adapter, save_base
from support.models.packed_forward import PackedForward, pack_folder
from support.servers.service import Service, greedy_by_peft, make_base, running, stats_of
from support.servers.waiting import wait_until

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = [  # ranks, scales and layers differ
    LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "lm_head"]),
    LoraConfig(r=6, lora_alpha=6, target_modules=ALL, rank_pattern={"o_proj": 2}, alpha_pattern={"v_proj": 1}),
]
WEIGHTS = [0.7, -0.3, 1.6]
LENGTHS = (21, 5, 9, 14)
SLOTS = (1, 0, None, 1)  # 0: one adapter, 1: the mix


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("mixes") / "base", "llama")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    return [save_adapter(base, base.parent / str(seed), config, seed=seed) for seed, config in enumerate(CONFIGS)]


def mix(loaded: BaseModel, folders: Sequence[Path], weights: Sequence[float]) -> PackedAdapter:
    parts = [(pack_folder(folder, loaded), float(weight)) for folder, weight in zip(folders, weights, strict=True)]
    digest = mix_of(Part(adapter.digest, weight) for adapter, weight in parts)
    return mixed(digest, parts, loaded.description, HostBuffers(), TimeSlices())


def by_peft(
    base: Path, folders: Sequence[Path], weights: Sequence[float], dtype: torch.dtype = torch.float32
) -> PeftModel:
    """PEFT with the sum as its active adapter, called mix."""
    model = peft_model(base, folders[0], dtype=dtype)
    assert isinstance(model, PeftModel)
    names = ["default", "second", "third"][: len(folders)]  # PEFT 0.21 takes "0" for a part of "layers.0" when it saves
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, name)
    model.base_model.add_weighted_adapter(names, list(weights), "mix", combination_type="cat")
    model.set_adapter("mix")
    return model.to(dtype).eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(base: Path, dtype: str, folders: Sequence[Path], weights: Sequence[float]) -> list[torch.Tensor]:
    loaded = load_base(base, dtype=dtype)
    forward = PackedForward(loaded, [folders[0], mix(loaded, folders, weights)], num_sequences=len(SLOTS))
    requests = [forward.request(index, ids, SLOTS[index]) for index, ids in enumerate(prompts())]
    first = forward.logits(requests, [3] * len(requests))
    return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]


def test_a_mixed_batch_has_pefts_logits_of_the_weighted_sum(base: Path, adapters: list[Path]) -> None:
    def exact(dtype: torch.dtype) -> list[torch.Tensor]:
        models = {1: by_peft(base, adapters, WEIGHTS, dtype), None: peft_model(base, None, dtype=dtype)}
        models[0] = peft_model(base, adapters[0], dtype=dtype)
        with torch.inference_mode():
            return [models[slot](torch.tensor([ids])).logits[0] for slot, ids in zip(SLOTS, prompts(), strict=True)]

    expected = exact(torch.float32)
    for one, other in zip(ours(base, "float32", adapters, WEIGHTS), expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))
    assert error(ours(base, "bfloat16", adapters, WEIGHTS), expected) <= 1.2 * error(exact(torch.bfloat16), expected)


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((one.float() - other).pow(2).mean()) for one, other in zip(got, exact, strict=True)) ** 0.5


def test_other_rows_keep_their_bits_whatever_is_mixed_beside_them(base: Path, adapters: list[Path]) -> None:
    one, other = (ours(base, "bfloat16", adapters, weights) for weights in (WEIGHTS, [0.1, 0.2, 0.3]))
    for slot, with_one, with_other in zip(SLOTS, one, other, strict=True):
        assert torch.equal(with_one, with_other) == (slot != 1), slot


def test_a_weight_alone_is_another_alpha_bit_by_bit(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """The largest product of weight and scale stays the scale of the sum, so nothing is rounded."""
    loaded = load_base(base, dtype="bfloat16")
    (tmp_path / WEIGHTS_FILE).write_bytes((adapters[0] / WEIGHTS_FILE).read_bytes())
    body = json.loads((adapters[0] / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**body, "lora_alpha": body["lora_alpha"] * -0.25}))
    wanted, got = pack_folder(tmp_path, loaded), mix(loaded, adapters[:1], [-0.25])
    assert got.modules == wanted.modules
    assert torch.equal(got.buffer, wanted.buffer)


def test_int8_parts_make_an_int8_mix_of_the_same_bytes(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    small, dequantised = [], []
    for index, folder in enumerate(adapters):
        for made in (small, dequantised):
            made.append(tmp_path / f"{index}-{len(small)}")
            made[-1].mkdir()
        body = json.loads((folder / CONFIG_FILE).read_text())
        (small[-1] / CONFIG_FILE).write_text(json.dumps({**body, DTYPE_FIELD: "int8"}))
        (small[-1] / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
        (dequantised[-1] / CONFIG_FILE).write_text(json.dumps(body))
        whole = {}
        for name, values in load_file(folder / WEIGHTS_FILE).items():
            scales = values.abs().amax(dim=1 if "lora_A" in name else 0, keepdim=True) / 127
            whole[name] = torch.round(values / scales.clamp_min(1e-30)) * scales
        save_file(whole, dequantised[-1] / WEIGHTS_FILE)
    loaded = load_base(base, dtype="float32")
    assert mix(loaded, small, WEIGHTS).is_int8
    assert 3.5 * mix(loaded, small, WEIGHTS).num_bytes < mix(loaded, adapters, WEIGHTS).num_bytes
    forward = PackedForward(loaded, [mix(loaded, small, WEIGHTS)])
    ids = prompts()[0]
    with torch.inference_mode():
        wanted = by_peft(base, dequantised, WEIGHTS)(torch.tensor([ids])).logits[0]
    assert (forward.logits([forward.request(0, ids, 0)])[0] - wanted).abs().max() <= 1e-4 * float(wanted.abs().max())
    with pytest.raises(NotCombinable, match="one is int8 and another is not"):
        mix(loaded, [small[0], adapters[1]], [1, 1])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "one is DoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "its own embedding or head"),
        (LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), "LoRA on the embedding"),
    ],
)
def test_what_is_no_sum_of_deltas_is_refused(
    config: LoraConfig, reason: str, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    other = random_peft.save(base, tmp_path / "other", config, 5)
    with pytest.raises(NotCombinable, match=reason) as refused:
        mix(load_base(base, dtype="float32"), [adapters[0], other], [1, 1])
    assert (refused.value.code, refused.value.status, refused.value.param) == ("adapters_not_combinable", 400, "model")


def test_the_digest_spells_the_parts_whatever_their_order() -> None:
    one, other = Part(AdapterDigest("sha256:aa"), 0.1), Part(AdapterDigest("sha256:bb"), -1e-17)
    assert mix_of([one, other]) == mix_of([other, one])
    assert parts_of(mix_of([other, one])) == (one, other)
    assert mix_of([one, one]) != mix_of([one])
    assert mix_of([one, other]) != mix_of([one, Part(other.digest, one.weight)])
    assert parts_of(one.digest) == ()
    assert has_part(mix_of([one, other]), one.digest)
    assert not has_part(mix_of([one, other]), AdapterDigest("sha256:a"))
    assert not has_part(one.digest, one.digest)
    assert not has_part(mix_of([one]), mix_of([one]))


class World:
    """A running service with the adapters, and how a mix of them is asked for."""

    def __init__(self, service: Service, base: Path, folders: list[Path], root: Path) -> None:
        self.service = service
        self._base = base
        self._folders = folders
        self._root = root

    def version(self, weights: Sequence[float]) -> AdapterVersion:
        names = [str(index) for index in range(len(weights))]
        parts = [Part(self.service.versions[name].digest, weight) for name, weight in zip(names, weights, strict=True)]
        return replace(self.service.versions["0"], name="+".join(names), digest=mix_of(parts))

    def wanted(self, weights: Sequence[float], prompt: list[int], count: int) -> list[int]:
        folder = self._root / f"{weights}"
        if not folder.exists():
            by_peft(self._base, self._folders[: len(weights)], weights).save_pretrained(
                folder, selected_adapters=["mix"], save_embedding_layers=False
            )
        return greedy_by_peft(self._base, folder / "mix", prompt, count)


def test_tokens_are_pefts_in_a_pool_for_few_and_caches_know_the_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folders = [save_adapter(base, tmp_path / str(seed), config, seed=seed) for seed, config in enumerate(CONFIGS)]
    published = {str(index): folder for index, folder in enumerate(folders)}
    small = MemoryBudget(kv_cache=4 << 20, adapter_pool=250_000, host_cache=500_000)
    with running(base, published, tmp_path / "data", memory=small) as service:
        world = World(service, base, folders, tmp_path / "peft")
        prompt = list(range(40, 61))
        sums = [[0.5, 0.5], [0.7, 0.3], [1.0, -1.0, 2.0]]
        with service.held():
            answers = [(weights, service.ask(prompt, world.version(weights), max_tokens=6)[1]) for weights in sums * 2]
            plain = service.ask(prompt, "0", max_tokens=6)[1]
        wanted = {str(weights): world.wanted(weights, prompt, 6) for weights in sums}
        for weights, answer in answers:
            assert answer.tokens() == wanted[str(weights)]
        assert plain.tokens() == greedy_by_peft(base, folders[0], prompt, 6)
        stats = stats_of(service.worker)
        assert stats.counters["adapter_evictions"] > 0

        again, other = (
            service.ask(prompt, world.version(weights), max_tokens=1)[1].collect()[-1].num_cached_tokens
            for weights in (sums[-1], [1.0, -1.0, 1.5])
        )
        assert (again, other) == (16, 0)


def test_new_weights_in_each_request_delay_another_tenants_cold_adapter_by_one_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    folders = [save_adapter(base, tmp_path / str(seed), config, seed=seed) for seed, config in enumerate(CONFIGS)]
    published = {str(index): folder for index, folder in enumerate(folders)}
    with running(base, published, tmp_path / "data") as service:
        world, prompt = World(service, base, folders, tmp_path / "peft"), list(range(40, 61))
        store, host = service.store, service.parts.adapters.host
        load_packed, go_on = store.load_packed, threading.Event()
        loads: list[AdapterDigest] = []

        def load(digest: AdapterDigest, *args: Any, **named: Any) -> PackedAdapter:
            loads.append(digest)
            assert go_on.wait(60)
            return load_packed(digest, *args, **named)

        monkeypatch.setattr(store, "load_packed", load)
        with service.held():
            flood = [service.ask(prompt, world.version([0.5, index / 64]), max_tokens=2) for index in range(24)]
        wait_until(lambda: loads and host.stats().misses >= 8)
        for request_id, _ in flood[:12]:
            service.worker.abort(request_id)
        cold = service.versions["2"].digest
        answer = service.ask(prompt, "2", tenant="globex", max_tokens=2)[1]
        wait_until(lambda: cold in host._loads)
        go_on.set()
        assert answer.tokens() == greedy_by_peft(base, folders[2], prompt, 2)
        assert all(each.tokens() for _, each in flood[12:])
        assert loads.index(cold) == 1
        assert len(loads) <= 1 + 1 + 12, "a load is dropped with its last request"


def test_a_part_that_leaves_service_takes_its_mixes_along_when_their_requests_have_ended(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folders = [save_adapter(base, tmp_path / str(seed), config, seed=seed) for seed, config in enumerate(CONFIGS[:2])]
    with running(base, {"0": folders[0], "1": folders[1]}, tmp_path / "data") as service:
        world = World(service, base, folders, tmp_path / "peft")
        version, prompt = world.version([0.5, 2.0]), list(range(40, 61))
        assert service.tokens(prompt, version) == world.wanted([0.5, 2.0], prompt, 16)
        with service.held():
            running_on = service.ask(prompt, version, max_tokens=100)[1]
        assert running_on.events.get(timeout=60).finish_reason is None
        [gone] = service.store.delete("acme", "1")
        assert service.store.not_in_service([version.digest, service.versions["0"].digest]) == [version.digest]
        service.worker.forget_adapters([gone])
        assert running_on.collect()[-1].error is None
        wait_until(lambda: version.digest not in stats_of(service.worker).held_adapters)
        failed = service.ask(prompt, version)[1].collect()[-1]
        assert failed.error is not None
        assert (failed.error.code, failed.error.status) == ("model_not_found", 404)
        assert service.tokens(prompt, "0") == greedy_by_peft(base, folders[0], prompt, 16)


def test_a_part_of_many_mixes_is_forgotten_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the engine's thread, where every stream waits for it: a pass for each of them took minutes."""
    base = make_base(tmp_path / "base")
    folder = save_adapter(base, tmp_path / "0", CONFIGS[0], seed=0)
    with running(base, {"0": folder}, tmp_path / "data") as service:
        digest, prompt = service.versions["0"].digest, list(range(40, 61))
        assert service.tokens(prompt, "0")
        mixes = {mix_of([Part(digest, 1 + index / 8192)]): "acme/0@1" for index in range(500)}
        service.parts.engine._names |= mixes
        parsed: list[AdapterDigest] = []

        def counted(each: AdapterDigest) -> tuple[Part, ...]:
            parsed.append(each)
            return parts_of(each)

        monkeypatch.setattr(mix_module, "parts_of", counted)
        service.worker.forget_adapters([digest])
        wait_until(lambda: digest not in stats_of(service.worker).held_adapters)
        assert len(parsed) <= 2 * len(mixes)
        assert not mixes.keys() & service.parts.engine._names.keys()
