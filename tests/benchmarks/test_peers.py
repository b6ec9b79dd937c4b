"""What the comparisons with other servers rest on: files in their format, figures turned the right way round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from adapters_store.base.files import describe_base
from benchmarks.common.adapters import write_adapter
from benchmarks.common.report import Report, number
from benchmarks.common.shapes import QUICK, base_folder
from benchmarks.peers import comparison
from benchmarks.peers.gguf_files import F32, write_adapter_gguf, write_gguf
from benchmarks.peers.loads import FULL_LOADS, MakeAsk, Outcome


def tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(file).tensors}


def test_an_adapter_in_gguf_changes_the_base_in_gguf_as_its_merge_changes_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of q and k are in another order there, so a product of the parts shows whether both follow it."""
    monkeypatch.setenv("MULTILORA_BENCH_CACHE", str(tmp_path / "cache"))
    base = base_folder(QUICK)
    adapter = write_adapter(tmp_path / "adapter", describe_base(base), rank=4, seed=1)
    merged = merge(base, adapter, tmp_path / "merged")
    ours, whole = (tensors(write_gguf(folder, tmp_path / f"{folder.name}.gguf", F32)) for folder in (base, merged))
    parts = tensors(write_adapter_gguf(adapter, base, tmp_path / "adapter.gguf"))
    changed = {name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")}
    assert len(changed) == 7 * QUICK.layers
    for name in changed:
        product = ours[name] + 2 * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        np.testing.assert_allclose(product, whole[name], atol=1e-6, err_msg=name)


def merge(base: Path, adapter: Path, target: Path) -> Path:
    """The base with the adapter's product added, in float32; alpha is twice the rank."""
    target.mkdir()
    (target / "config.json").write_text((base / "config.json").read_text())
    (target / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    matrices = load_file(adapter / "adapter_model.safetensors")
    weights = {name: weight.float() for name, weight in load_file(base / "model.safetensors").items()}
    for name in [name for name in matrices if name.endswith("lora_A.weight")]:
        b = matrices[name.replace("lora_A", "lora_B")].float()
        own = name.removeprefix("base_model.model.").replace("lora_A.", "")
        weights[own] += 2 * b @ matrices[name].float()
    save_file(weights, target / "model.safetensors")
    return target


def outcome(*, tokens_per_s: float, ttft_ms: float) -> Outcome:
    return Outcome(tokens_per_s, ttft_ms, token_ms=1.0, token_p95_ms=2.0)


def test_more_than_one_is_better_for_us_in_tokens_and_in_milliseconds() -> None:
    fast, slow = outcome(tokens_per_s=30, ttft_ms=100), outcome(tokens_per_s=10, ttft_ms=150)
    tokens, prompt = FULL_LOADS[0], FULL_LOADS[7]
    assert number(comparison._row(tokens, [fast], [slow], busy=0)["times_as_fast"]) == 3
    assert number(comparison._row(prompt, [fast], [slow], busy=0)["times_as_fast"]) == 1.5
    assert number(comparison._row(prompt, [slow], [fast], busy=1)["ours"]) == 150


def test_the_peers_best_setting_is_kept_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTILORA_BENCH_PEERS", str(tmp_path))
    speeds, tried = {"1": 5.0, "2": 7.0, "all": 6.0}, list[str]()

    class Peer:
        name = "peer"
        settings = tuple(speeds)

        @contextmanager
        def running(self, setting: str, *, adapters: bool = True) -> Iterator[MakeAsk]:
            raise AssertionError("the trial is replaced")
            yield

    def trial(report: object, peer: object, setting: str, shape: object, busy: int) -> float:
        tried.append(setting)
        return speeds[setting]

    monkeypatch.setattr(comparison, "_trial", trial)
    report = Report("versus_peer", quick=False, out=tmp_path)
    once = comparison.Plan(loads=FULL_LOADS, rounds=1, busy=[0], try_again=False, setting=None)
    again = comparison.Plan(loads=FULL_LOADS, rounds=1, busy=[0], try_again=True, setting=None)
    assert [comparison._best_setting(report, Peer(), QUICK, 0, plan) for plan in (once, once, again)] == ["2"] * 3
    assert tried == 2 * list(speeds)
    assert json.loads((tmp_path / "versus_peer.json").read_text()).keys() == {f"{comparison.hardware()}, 0 busy"}
