"""Mutated JSON files of a sound base: each folder is described or refused by UnsupportedBase, and its code never runs.

MULTILORA_FUZZ multiplies the mutants; MULTILORA_FUZZ_SEED draws others.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.families import UnsupportedBase
from adapters_store.base.files import describe_base
from adapters_store.base.tokenizer import load_tokenizer
from server.engine.text.tokenizer import Tokenizer
from support.models.odd_bases import MARKER, OWN_CODE, add_code, change_json
from support.servers.service import make_base

NUM_MUTANTS = 40 * max(int(os.environ.get("MULTILORA_FUZZ", "0")), 1)
SEED = int(os.environ.get("MULTILORA_FUZZ_SEED", "2026"))
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 10**9, 10**400, -(10**400), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "auto",
        "llama",
        "float64",
        "../../etc",
        "a" * 5000,
        "\ud800",
        [],
        [[]],
        [1] * 9,
        {},
        {"": None},
        {"a": {"b": []}},
    ),
    *(OWN_CODE, {"rope_type": "longrope"}, {"rope_type": "yarn", "factor": -1}, {"quant_method": "gptq"}),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("fuzz") / "base")
    add_code(folder)
    return folder


def leaves(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value may be replaced: every key and every index, inner ones too."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def mutate(body: Any, dice: random.Random) -> None:
    path = dice.choice(list(leaves(body)))
    owner = body
    for key in path[:-1]:
        owner = owner[key]
    if isinstance(owner, dict) and dice.random() < 0.2:
        del owner[path[-1]]
    else:
        owner[path[-1]] = copy.deepcopy(dice.choice(VALUES))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_mutated_base_is_read_or_refused(sound: Path, tmp_path: Path, name: str) -> None:
    dice = random.Random(f"{SEED} {name}")
    folder = tmp_path / "base"
    shutil.copytree(sound, folder)
    read = refused = 0
    for _ in range(NUM_MUTANTS):
        body = json.loads((sound / name).read_text())
        for _change in range(dice.choice([1, 1, 2, 4])):
            mutate(body, dice)
        (folder / name).write_text(json.dumps(body))
        try:
            describe_base(folder)
            Tokenizer.load(folder)
        except UnsupportedBase:
            refused += 1
        else:
            read += 1
    assert read > 0
    assert refused > 0
    assert not list(tmp_path.rglob(MARKER))


@pytest.mark.parametrize("field", ["head_dim", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_size_beyond_the_files_is_refused_before_memory_is_filled(sound: Path, tmp_path: Path, field: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sound, folder)
    change_json(folder / "config.json", **{field: 10**9})
    with pytest.raises(UnsupportedBase, match=f"{field} is 1000000000, at most [0-9]+ is possible"):
        describe_base(folder)


def test_two_tokens_of_one_id_are_refused(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sound, folder)
    body = json.loads((folder / "tokenizer.json").read_text())
    (first, id_), (second, _) = list(body["model"]["vocab"].items())[-2:]
    body["model"]["vocab"][second] = id_
    (folder / "tokenizer.json").write_text(json.dumps(body))
    for _process_order in range(5):  # the order of a hash map differs from load to load
        with pytest.raises(UnsupportedBase, match=f"share the id {id_}") as refusal:
            load_tokenizer(folder)
        assert all(repr(token) in str(refusal.value) for token in (first, second))
