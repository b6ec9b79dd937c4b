"""A process that changes a store in every way is killed at a random moment, again and again, on one data directory.

What it was told is done is there afterwards, what it had begun is there whole or not at all, and nothing else is.
MULTILORA_KILLS: how often (20).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, write
from support.servers.store_life import BASE, NAMES, TENANT, Model, ops_of, state_of

NUM_KILLS = int(os.environ.get("MULTILORA_KILLS", "20"))
NUM_CONTENTS = 4
OPS_PER_LIFE = 200
fork = multiprocessing.get_context("fork")


@pytest.fixture
def uploads(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / f"w{seed}", safetensors_bytes(lora_tensors(BASE, seed=seed))) for seed in range(NUM_CONTENTS)
    ]


def live_and_die(data_dir: Path, seed: int, uploads: list[Path], num_changes: int, more_s: float) -> list[str]:
    """Run a life's changes in a process of its own and kill it, more_s after num_changes are done; what it reported of
    each change that is done."""
    reader, writer = os.pipe()

    def live() -> None:
        store = AdapterStore.open(data_dir)
        os.write(writer, b"!")
        for op in ops_of(seed, OPS_PER_LIFE, NUM_CONTENTS):
            os.write(writer, f"{op.run(store, uploads)}\n".encode())
        time.sleep(60)

    process = fork.Process(target=live)
    process.start()
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    begun = b""
    while begun.count(b"\n") < num_changes:
        begun += os.read(reader, 1 << 16)
    time.sleep(more_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=300)
    with open(reader, "rb") as rest:
        return (begun + rest.read()).decode().splitlines()


def check_whole(store: AdapterStore, data_dir: Path) -> None:
    """Every row's bytes are those of its digest; after a sweep there is no blob and no left-over without a row."""
    versions = [version for name in NAMES for version in store.versions(TENANT, name)]
    for version in versions:
        store.verify(version.digest, BASE)
    assert store.check_integrity().quarantined == []
    store.sweep(grace_s=-1)
    assert {f"sha256:{blob.name}" for blob in (data_dir / "blobs").glob("??/*")} == {v.digest for v in versions}
    assert list((data_dir / "staging").iterdir()) == []
    assert list((data_dir / "blobs").glob("??/*/.packed-*")) == []


POINTS_NOWHERE = """
SELECT 'canary', a.name, w.number FROM alias_weights w JOIN adapters a ON a.id = w.adapter_id
  LEFT JOIN adapter_versions v ON v.adapter_id = w.adapter_id AND v.number = w.number
  LEFT JOIN adapter_versions m ON m.adapter_id = w.adapter_id AND m.number = a.active_number
  WHERE v.id IS NULL OR v.unloaded OR w.number = a.active_number OR m.id IS NULL OR m.unloaded
UNION ALL SELECT 'active', a.name, a.active_number FROM adapters a
  LEFT JOIN adapter_versions v ON v.adapter_id = a.id AND v.number = a.active_number
  WHERE a.active_number IS NOT NULL AND v.id IS NULL
UNION ALL SELECT 'history', a.name, h.number FROM alias_history h JOIN adapters a ON a.id = h.adapter_id
  LEFT JOIN adapter_versions v ON v.adapter_id = h.adapter_id AND v.number = h.number WHERE v.id IS NULL
"""


def check_names(store: AdapterStore) -> None:
    """No name means a version that is missing or not in service; the shares of those it means add up to 100."""
    with store.database.read() as connection:
        assert connection.execute(text(POINTS_NOWHERE)).all() == []
        open_keys = connection.execute(text("SELECT count(*) FROM api_keys WHERE expires_at IS NULL")).scalar_one()
    assert open_keys == 1
    for name in NAMES:
        versions = store.versions(TENANT, name)
        is_served = any(version.active and version.loaded for version in versions)
        assert sum(version.percent for version in versions) == (100 if is_served else 0)


def test_a_killed_process_loses_nothing_it_was_told_is_done(data_dir: Path, uploads: list[Path]) -> None:
    store = AdapterStore.open(data_dir)
    store.tenants.create(TENANT)
    digests = []
    for weights in uploads:
        kept = store.publish(tenant=TENANT, name="law", config=config_bytes(), weights=weights, base=BASE)
        digests.append(kept.digest)
    store.tenants.delete(TENANT)
    model = Model(digests, store.tenants.create(TENANT).api_key)
    store.close()
    dice, num_done, num_torn = random.Random(NUM_KILLS), 0, 0
    for seed in range(NUM_KILLS):
        told = live_and_die(data_dir, seed, uploads, dice.randrange(6), dice.uniform(0.0, 0.05))
        ops, keys = ops_of(seed, OPS_PER_LIFE, NUM_CONTENTS), [model.key]
        for op, said in zip(ops, told, strict=False):
            model.apply(op, said)
            keys.append(model.key)
        store = AdapterStore.open(data_dir)
        check_whole(store, data_dir)
        check_names(store)
        state = state_of(store)
        if state != model.state:
            model.apply(ops[len(told)], "")  # the change it was in when it died had been made
            num_torn += 1
        assert state == model.state, f"life {seed} after {len(told)} changes, then {ops[len(told)]}"
        opening = {key for key in keys if store.tenants.authenticate(key) is not None}
        assert opening == {model.key} - {""}
        store.close()
        num_done += len(told)
    assert num_done > NUM_KILLS
    print(f"{NUM_KILLS} kills, {num_done} changes confirmed, {num_torn} made but not confirmed")
