"""A base that was trained whole is a base of its own: adapters of the old one are refused on it by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.store import AdapterStore
from support.trainers.training import demo_spec
from trainer.run import train


def test_adapters_of_the_old_base_are_refused_on_a_base_trained_whole(tmp_path: Path) -> None:
    short = {"optim": {"learning_rate": 1e-3, "max_steps": 1}, "eval_every": 1}
    lora, full = (demo_spec(tmp_path, method=method, **short) for method in ("lora", "full"))
    train(lora, tmp_path / "lora", resume=False)
    train(full, tmp_path / "full", resume=False)
    adapter = tmp_path / "lora" / "adapter"
    old, new = describe_base(lora.base), describe_base(tmp_path / "full" / "model")
    assert old.modules == new.modules
    assert old.digest != new.digest
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as weights:
        assert weights.metadata()["multilora_base_digest"] == old.digest
    store = AdapterStore.open(tmp_path / "data")
    store.tenants.create("acme")
    with pytest.raises(
        AdapterRejected, match=rf"made for base .*{old.digest}.*this base is {new.digest} \(model\)"
    ) as error:
        store.publish(
            tenant="acme",
            name="style",
            config=(adapter / "adapter_config.json").read_bytes(),
            weights=adapter / "adapter_model.safetensors",
            base=new,
        )
    assert error.value.code == "wrong_base"
    store.close()
