"""Adapters copied into the arena: the bytes, the table row, and the tokens that come of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.layout import PackedAdapter, PackedModule
from lora_kernels.background import TimeSlices
from lora_kernels.lora.batch import LoraTable
from server.engine.model import adapter_copier as adapter_memory
from server.engine.model.adapter_copier import ArenaCopier
from server.engine.startup.settings import MemoryBudget
from support.models.adapter_files import tiny_base
from support.models.models import save_adapter
from support.servers.service import running
from support.servers.waiting import wait_until

RANKS = {"a": 4, "b": 4, "c": 4, "d": 4, "large": 8}
NAMES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
THREADED, INLINE = 0, 1 << 30


@pytest.fixture(params=[THREADED, INLINE], ids=["on the copier's thread", "inline"])
def inline_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_memory, "INLINE_COPY_BYTES", request.param)


@pytest.fixture
def table() -> LoraTable:
    return LoraTable(torch.full((4096,), -1.0), len(tiny_base().modules), 4)


@pytest.fixture
def copier(table: LoraTable, inline_bytes: None) -> Iterator[ArenaCopier]:
    copier = ArenaCopier(table, tiny_base(), TimeSlices())
    yield copier
    copier.close()


@pytest.mark.parametrize("offset", [0, 960, 1024])
def test_a_copied_adapter_has_its_numbers_and_its_table_row_at_its_place(
    table: LoraTable, copier: ArenaCopier, offset: int
) -> None:
    names = list(tiny_base().modules)
    modules = (PackedModule(names[2], 3, 0.5, 0, 400), PackedModule(names[0], 5, 2.0, 800, 900))
    buffer = torch.arange(1024.0)
    address = table.offsets.data_ptr()
    wait_until(copier.start(1, offset, PackedAdapter(AdapterDigest("sha256:a"), buffer, modules)))
    assert torch.equal(table.arena[offset : offset + 1024], buffer)
    assert bool((table.arena[:offset] == -1).all())
    assert bool((table.arena[offset + 1024 :] == -1).all())
    for module in modules:
        row = names.index(module.name)
        assert table.offsets[row, 1].tolist() == [offset + module.a_offset, offset + module.b_offset]
        assert (int(table.ranks[row, 1]), float(table.scales[row, 1])) == (module.rank, module.scale)
    assert table.offsets.data_ptr() == address, "recorded launches read the old table"


def test_what_an_offset_does_to_alignment_is_known(table: LoraTable, copier: ArenaCopier) -> None:
    modules = (PackedModule(next(iter(tiny_base().modules)), 1, 1.0, 0, 64),)
    packed = PackedAdapter(AdapterDigest("sha256:a"), torch.zeros(128), modules)
    copier.start(0, 1024, packed)
    assert table.is_aligned_to(64)
    copier.start(1, 1020, packed)
    assert not table.is_aligned_to(64)
    assert table.is_aligned_to(16)


class SideStream:
    """Replaces a CUDA stream; records the arena's content when it was asked to wait for the engine's stream."""

    device = torch.device("cpu")

    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena
        self.waited_for: list[object] = []
        self.seen: list[float] = []

    def wait_stream(self, other: object) -> None:
        self.waited_for.append(other)
        self.seen = self._arena.tolist()


def test_on_a_gpu_no_byte_is_written_before_all_that_the_engine_has_launched_so_far(
    table: LoraTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward launched ahead may still read the range of an adapter that was just evicted."""
    modules = (PackedModule(next(iter(tiny_base().modules)), 1, 1.0, 0, 64),)
    packed = PackedAdapter(AdapterDigest("sha256:a"), torch.arange(128.0), modules)
    copier = ArenaCopier(table, tiny_base(), TimeSlices())
    before = table.arena.tolist()
    stream = SideStream(table.arena)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the engine's")
    monkeypatch.setattr(torch.cuda, "stream", lambda entered: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda on: None, query=lambda: True))
    copier._stream = stream  # type: ignore[assignment]
    assert copier.start(0, 0, packed)()
    assert (stream.waited_for, stream.seen) == (["the engine's"], before)
    assert torch.equal(table.arena[:128], packed.buffer)
    copier.close()


@pytest.fixture
def folders(base: Path, tmp_path: Path) -> dict[str, Path]:
    configs = {name: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=NAMES) for name, rank in RANKS.items()}
    return {name: save_adapter(base, tmp_path / name, configs[name], seed=seed) for seed, name in enumerate(RANKS)}


def test_a_large_adapter_takes_room_in_fragmented_memory_and_every_token_stays_right(
    base: Path, folders: dict[str, Path], prompts: list[list[int]], tmp_path: Path, inline_bytes: None
) -> None:
    limits = MemoryBudget(kv_cache=1 << 20, adapter_pool=4 * bytes_of(base, folders["a"], tmp_path), host_cache=8 << 20)
    with running(base, folders, tmp_path / "data", memory=limits) as service:
        expected = {name: service.tokens(prompts[0], name) for name in "abcd"}
        service.worker.forget_adapters([service.versions[name].digest for name in "ac"])
        service.tokens(prompts[0], "large")  # as large as a and c together, and one of b and d lies between
        assert {name: service.tokens(prompts[0], name) for name in "bd"} == {name: expected[name] for name in "bd"}
        service.worker.forget_adapters([service.versions["large"].digest])
        assert {name: service.tokens(prompts[0], name) for name in "abcd"} == expected
        assert service.stats().counters["adapter_evictions"] >= 1


def bytes_of(base: Path, folder: Path, tmp_path: Path) -> int:
    """What an adapter takes on the device."""
    with running(base, {"a": folder}, tmp_path / "size") as service:
        return service.store.load_packed(service.versions["a"].digest, service.worker.base).num_bytes
