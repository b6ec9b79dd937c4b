"""The benchmarks' base, adapters and load reader are what they say they are."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.common.adapters import AliasedSource, BenchStore, bench_store
from benchmarks.common.shapes import QUICK, base_folder, byte_pair_tokenizer, made_once
from benchmarks.gate_table import EXAMPLES, QUICK_EXAMPLES
from benchmarks.peers.servers import OursHere
from benchmarks.server_load import read_requests
from benchmarks.training.gate_cases import cases as gate_cases
from server.engine.text.tokenizer import Tokenizer
from trainer.data.jsonl import DataLimits


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchStore]:
    """Three of them, in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        store = bench_store(QUICK, 3, say=lambda text: None)
        yield store
        store.close()


@pytest.mark.parametrize("size", [8192, 151_936])
def test_every_token_of_the_base_says_something(size: int) -> None:
    core = byte_pair_tokenizer(size)
    assert core.get_vocab_size() == size
    assert core.encode("Hello, tenant.").ids
    texts = [core.id_to_token(index) for index in range(size)]
    assert None not in texts
    assert len(set(texts)) == size


@pytest.mark.usefixtures("adapters")
def test_base_loads_with_its_tokenizer() -> None:
    folder = base_folder(QUICK)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.vocab_size == Tokenizer.load(folder).vocab_size == QUICK.vocab


def test_adapters_are_distinct_and_take_the_size_that_is_planned_for(adapters: BenchStore) -> None:
    assert len(set(adapters.digests)) == 3
    packed = adapters.store.load_packed(adapters.digests[0], adapters.base)
    assert QUICK.adapter_bytes(16) <= packed.num_bytes <= QUICK.adapter_bytes(16) * 1.01 + 64 * 1024
    assert all(bool(packed.buffer[module.b_offset].abs() > 0) for module in packed.modules)


def test_aliases_are_many_adapters_with_few_contents(adapters: BenchStore) -> None:
    source = AliasedSource(adapters, 7)
    assert len(set(source.digests)) == 7
    first, fourth = (source.load_packed(source.digests[index], adapters.base) for index in (0, 3))
    assert (first.digest, fourth.digest) == (source.digests[0], source.digests[3])
    assert first.buffer.equal(fourth.buffer)
    assert not first.buffer.equal(source.load_packed(source.digests[1], adapters.base).buffer)


def test_folder_made_once_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_half_way(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        made_once(tmp_path / "thing", fail_half_way)
    assert list(tmp_path.iterdir()) == []
    made_once(tmp_path / "thing", lambda folder: (folder / "all").touch())
    made_once(tmp_path / "thing", fail_half_way)
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["all"]


def request_row(**changes: object) -> dict[str, str]:
    row = {
        "tenant": "t",
        "sent_s": 10.0,
        "first_s": 10.5,
        "last_s": 11.5,
        "num_tokens": 5,
        "is_whole": True,
        "error": "",
    }
    return {key: str(value) for key, value in (row | changes).items()}


def test_requests_cut_off_by_the_end_count_their_tokens_but_no_latency() -> None:
    rows = [request_row(), request_row(sent_s=11.5, first_s=11.75, last_s=12.0, num_tokens=3, is_whole=False)]
    load = read_requests(rows, new_tokens=5)
    assert load.tokens_per_s == pytest.approx(8 / 2.0)
    assert load.ttfts_s == [0.5]
    assert load.tpots_s == [0.25]
    assert load.requests == 1


def test_one_failed_request_fails_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"1 of 2 requests failed.*503: queue_full"):
        read_requests([request_row(), request_row(error="503: queue_full")], new_tokens=5)


@pytest.mark.parametrize("count", [QUICK_EXAMPLES, EXAMPLES])
def test_every_case_of_the_gate_table_has_enough_examples_to_train_on(count: int) -> None:
    table = gate_cases(count)
    assert len({case.name for case in table}) == len(table) >= 20
    for case in table:
        assert len(set(case.pairs)) >= DataLimits().min_examples, case.name
        assert not case.validation or len(set(case.validation)) >= DataLimits().min_examples, case.name


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("model_tax", "--tensor-parallel"),
        ("soak", "--hours"),
        ("versus_vllm", "--busy"),
        ("gate_table", "--precision"),
        ("onboarding", "--out"),
        ("gpu_suite", "--quick"),
    ],
)
def test_help_names_each_option(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert option in capsys.readouterr().out


def test_a_server_on_a_thread_ends_with_a_block_that_raises(adapters: BenchStore, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    ours = OursHere(QUICK, [version.name for version in adapters.versions], tmp_path / "log")
    with pytest.raises(RuntimeError, match="of the block"), ours.running("as it starts"):
        raise RuntimeError("of the block")
    assert {thread.name for thread in set(threading.enumerate()) - before if not thread.daemon} == set()
