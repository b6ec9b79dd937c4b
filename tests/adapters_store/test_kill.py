"""A process that uploads, activates and deletes is killed at a random moment, again and again, on one data directory.

What it was told is done is there afterwards, what it had begun is there whole or not at all, and nothing else is.
MULTILORA_KILLS: how often (50).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from adapters_store.base import AdapterDigest
from adapters_store.errors import NotFound
from adapters_store.store import AdapterStore
from support.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write

BASE = tiny_base()
NUM_KILLS = int(os.environ.get("MULTILORA_KILLS", "50"))
NAMES = ("law", "med")
NUM_CONTENTS = 4
OPS_PER_LIFE = 200
fork = multiprocessing.get_context("fork")

Row = tuple[str, int, str, bool]  # name, version, digest, active


@dataclass(frozen=True)
class Op:
    """One change. content: which of the uploads. number: which version."""

    kind: Literal["publish", "activate", "delete", "delete all"]
    name: str
    content: int
    number: int

    def run(self, store: AdapterStore, uploads: list[Path]) -> None:
        with suppress(NotFound):
            if self.kind == "publish":
                weights = uploads[self.content]
                store.publish(tenant="acme", name=self.name, config=config_bytes(), weights=weights, base=BASE)
            elif self.kind == "activate":
                store.activate("acme", self.name, self.number)
            else:
                store.delete("acme", self.name if self.kind == "delete all" else f"{self.name}@{self.number}")


def ops_of(seed: int) -> list[Op]:
    """What a life would do, if it lasted."""
    dice = random.Random(seed)
    kinds: tuple[Literal["publish", "activate", "delete", "delete all"], ...]
    kinds = ("publish", "publish", "publish", "activate", "activate", "delete", "delete all")
    return [
        Op(dice.choice(kinds), dice.choice(NAMES), dice.randrange(NUM_CONTENTS), dice.randrange(1, 6))
        for _ in range(OPS_PER_LIFE)
    ]


@dataclass
class Model:
    """The rows as they should be."""

    digests: list[AdapterDigest]
    versions: dict[str, dict[int, str]] = field(default_factory=lambda: {name: {} for name in NAMES})
    last: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    active: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(NAMES))

    @property
    def rows(self) -> set[Row]:
        return {
            (name, number, digest, self.active[name] == number)
            for name, versions in self.versions.items()
            for number, digest in versions.items()
        }

    def apply(self, op: Op) -> None:
        versions = self.versions[op.name]
        if op.kind == "publish":
            digest = self.digests[op.content]
            known = [number for number, known in versions.items() if known == digest]
            self.last[op.name] += not known
            number = known[0] if known else self.last[op.name]
            versions[number], self.active[op.name] = digest, number
        elif op.kind == "activate" and op.number in versions:
            self.active[op.name] = op.number
        elif op.kind in ("delete", "delete all"):
            doomed = [number for number in versions if op.kind == "delete all" or number == op.number]
            for number in doomed:
                del versions[number]
            if self.active[op.name] in doomed:
                self.active[op.name] = None


@pytest.fixture
def uploads(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / f"w{seed}", safetensors_bytes(lora_tensors(BASE, seed=seed))) for seed in range(NUM_CONTENTS)
    ]


def live_and_die(data_dir: Path, seed: int, uploads: list[Path], life_s: float) -> int:
    """Run a life's changes in a process of its own, kill it, and return how many it was told were done."""
    reader, writer = os.pipe()

    def live() -> None:
        store = AdapterStore.open(data_dir)
        os.write(writer, b"!")
        for op in ops_of(seed):
            op.run(store, uploads)
            os.write(writer, b".")
        time.sleep(60)

    process = fork.Process(target=live)
    process.start()
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    time.sleep(life_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=30)
    num_done = 0
    while piece := os.read(reader, 4096):
        num_done += len(piece)
    os.close(reader)
    return num_done


def check_whole(store: AdapterStore, data_dir: Path) -> set[Row]:
    """Every row's bytes are those of its digest; after a sweep there is no blob and no left-over without a row."""
    versions = [version for name in NAMES for version in store.versions("acme", name)]
    for version in versions:
        store.verify(version.digest, BASE)
    assert store.look_over().put_away == []
    store.sweep(grace_s=-1)
    assert {f"sha256:{blob.name}" for blob in (data_dir / "blobs").glob("??/*")} == {v.digest for v in versions}
    assert list((data_dir / "staging").iterdir()) == []
    return {(version.name, version.version, version.digest, version.active) for version in versions}


def test_a_killed_process_loses_nothing_it_was_told_is_done(data_dir: Path, uploads: list[Path]) -> None:
    store = AdapterStore.open(data_dir)
    store.tenants.create("acme")
    digests = []
    for weights in uploads:
        kept = store.publish(tenant="acme", name="law", config=config_bytes(), weights=weights, base=BASE)
        digests.append(kept.digest)
    store.tenants.delete("acme")
    store.tenants.create("acme")
    store.close()
    model, dice, num_done, num_torn = Model(digests), random.Random(NUM_KILLS), 0, 0
    for seed in range(NUM_KILLS):
        done = live_and_die(data_dir, seed, uploads, dice.uniform(0.0, 0.15))
        ops = ops_of(seed)
        for op in ops[:done]:
            model.apply(op)
        store = AdapterStore.open(data_dir)
        rows = check_whole(store, data_dir)
        store.close()
        if rows != model.rows:
            model.apply(ops[done])  # the change it was in when it died had been made
            num_torn += 1
        assert rows == model.rows, f"life {seed} after {done} changes, then {ops[done]}"
        num_done += done
    assert num_done > NUM_KILLS
    print(f"{NUM_KILLS} kills, {num_done} changes confirmed, {num_torn} made but not confirmed")
