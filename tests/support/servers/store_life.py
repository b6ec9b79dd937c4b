"""Random changes of one tenant in a store, and what its rows are after them, written down once more in plain Python."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from sqlalchemy import select

from adapters_store.accounts.records import Quotas
from adapters_store.accounts.usage import UsageCounts, UsageKey, total_of
from adapters_store.base.description import AdapterDigest
from adapters_store.errors import Conflict, NotFound
from adapters_store.storage.schema import adapters, alias_history
from adapters_store.store import AdapterStore
from adapters_store.versions.alias_rows import MAX_HISTORY
from support.models.adapter_files import config_bytes, tiny_base

TENANT = "acme"
NAMES = ("law", "med")
BASE = tiny_base()
DAY = UsageKey("2026-01-01", TENANT, "base")
Kind = Literal[
    "publish", "upload", "activate", "canary", "promote", "roll back", "unload", "delete", "delete all",
    "rotate key", "set quotas", "use",
]  # fmt: skip
KINDS = (*get_args(Kind), *["publish"] * 2, *["upload"] * 3, *["canary"] * 7, *["promote"] * 4)  # so that they succeed


@dataclass(frozen=True)
class Op:
    """One change. content: which of the uploads. place: which of the versions there are. upload: publish without
    activating."""

    kind: Kind
    name: str
    content: int
    place: int
    percent: int

    def of(self, versions: Collection[int]) -> int:
        """The version that is meant."""
        return sorted(versions)[self.place % len(versions)] if versions else 1

    def run(self, store: AdapterStore, uploads: Sequence[Path]) -> str:
        """Make it, where it may be made; the new key, where it makes one."""
        names = store.aliases
        number = self.of([version.version for version in store.versions(TENANT, self.name)])
        with suppress(NotFound, Conflict):
            match self.kind:
                case "publish" | "upload":
                    weights, activate = uploads[self.content], self.kind == "publish"
                    kept = partial(store.publish, tenant=TENANT, name=self.name, config=config_bytes(), base=BASE)
                    kept(weights=weights, activate=activate)
                case "activate":
                    names.activate(TENANT, self.name, number)
                case "canary":
                    names.set_canary(TENANT, self.name, number, self.percent)
                case "promote":
                    names.promote(TENANT, self.name)
                case "roll back":
                    names.roll_back(TENANT, self.name)
                case "unload":
                    names.unload(TENANT, self.name, number)
                case "delete" | "delete all":
                    store.delete(TENANT, self.name if self.kind == "delete all" else f"{self.name}@{number}")
                case "rotate key":
                    return store.tenants.rotate_key(TENANT).api_key
                case "set quotas":
                    store.quotas.set(TENANT, Quotas(tokens_per_minute=self.percent, max_concurrent=self.place))
                case "use":
                    store.usage.add({DAY: UsageCounts(1, self.percent, 0, self.place)})
        return ""


def ops_of(seed: int, count: int, num_contents: int) -> list[Op]:
    """What a life would do, if it lasted."""
    dice = random.Random(seed)
    return [
        Op(
            dice.choice(KINDS),
            dice.choice(NAMES),
            dice.randrange(num_contents),
            dice.randrange(12),
            dice.choice((0, 10, 10, 60)),
        )
        for _ in range(count)
    ]


@dataclass
class Name:
    """One name's versions and what the bare name means."""

    versions: dict[int, str] = field(default_factory=dict)
    unloaded: set[int] = field(default_factory=set)
    canaries: dict[int, int] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)
    active: int | None = None
    last: int = 0

    def publish(self, digest: str, *, activate: bool) -> None:
        known = [number for number, kept in self.versions.items() if kept == digest]
        self.last += not known
        number = known[0] if known else self.last
        self.versions[number] = digest
        if activate:
            self.activate(number)

    def activate(self, number: int) -> None:
        if number not in self.versions:
            return
        if self.active is not None and self.active != number:
            self.history = [*self.history, self.active][-MAX_HISTORY:]
        self._point_at(number)

    def _point_at(self, number: int) -> None:
        self.active, self.canaries = number, {}
        self.unloaded.discard(number)

    def set_canary(self, number: int, percent: int) -> None:
        others = sum(share for each, share in self.canaries.items() if each != number)
        served = self.versions.keys() - self.unloaded
        if self.active in served and number in served and number != self.active and others + percent <= 99:
            self.canaries.pop(number, None)
            self.canaries.update({number: percent} if percent else {})

    def promote(self) -> None:
        if len(self.canaries) == 1:
            self.activate(*self.canaries)

    def roll_back(self) -> None:
        if self.canaries:
            self.canaries = {}
            return
        usable = [
            place
            for place, number in enumerate(self.history)
            if number in self.versions and number not in self.unloaded and number != self.active
        ]
        if usable:
            number = self.history[usable[-1]]
            del self.history[usable[-1] :]
            self._point_at(number)

    def withdraw(self, numbers: Collection[int], *, is_gone: bool) -> None:
        takes_active = self.active in numbers
        self.canaries = {n: share for n, share in self.canaries.items() if not takes_active and n not in numbers}
        if not is_gone:
            self.unloaded.update(numbers)
            return
        self.history = [number for number in self.history if number not in numbers]
        self.versions = {number: kept for number, kept in self.versions.items() if number not in numbers}
        self.unloaded -= set(numbers)
        self.active = None if takes_active else self.active

    def percent(self, number: int) -> int:
        if number in self.unloaded:
            return 0
        return 100 - sum(self.canaries.values()) if number == self.active else self.canaries.get(number, 0)


@dataclass
class Model:
    """What the store should hold. key: the one that opens; "" where nobody was told it."""

    digests: list[AdapterDigest]
    key: str
    names: dict[str, Name] = field(default_factory=lambda: {name: Name() for name in NAMES})
    num_keys: int = 1
    quotas: Quotas = field(default_factory=Quotas)
    used: UsageCounts = field(default_factory=UsageCounts)

    def apply(self, op: Op, told: str) -> None:
        name = self.names[op.name]
        number = op.of(name.versions)
        meant = [each for each in name.versions if op.kind == "delete all" or each == number]
        match op.kind:
            case "publish" | "upload":
                name.publish(self.digests[op.content], activate=op.kind == "publish")
            case "activate":
                name.activate(number)
            case "canary":
                name.set_canary(number, op.percent)
            case "promote":
                name.promote()
            case "roll back":
                name.roll_back()
            case "unload" | "delete" | "delete all":
                name.withdraw(meant, is_gone=op.kind != "unload")
            case "rotate key":
                self.key, self.num_keys = told, self.num_keys + 1
            case "set quotas":
                self.quotas = Quotas(tokens_per_minute=op.percent, max_concurrent=op.place)
            case "use":
                self.used.add(UsageCounts(1, op.percent, 0, op.place))

    @property
    def state(self) -> dict[str, object]:
        """To be compared with `state_of` a store."""
        rows = {
            (each, number, digest, number == name.active, number not in name.unloaded, name.percent(number))
            for each, name in self.names.items()
            for number, digest in name.versions.items()
        }
        history = {each: name.history for each, name in self.names.items() if name.history}
        return {
            "rows": rows, "history": history, "keys": self.num_keys, "quotas": self.quotas, "used": self.used
        }  # fmt: skip


def state_of(store: AdapterStore) -> dict[str, object]:
    """The same of a store."""
    versions = [version for name in NAMES for version in store.versions(TENANT, name)]
    rows = {(v.name, v.version, v.digest, v.active, v.loaded, v.percent) for v in versions}
    history: dict[str, list[int]] = {}
    with store.database.read() as connection:
        joined = alias_history.join(adapters, adapters.c.id == alias_history.c.adapter_id)
        columns = select(adapters.c.name, alias_history.c.number).select_from(joined).order_by(alias_history.c.id)
        for name, number in connection.execute(columns):
            history.setdefault(name, []).append(number)
    used = total_of(store.usage.rows())
    quotas = store.quotas.get(TENANT)
    return {"rows": rows, "history": history, "keys": len(store.tenants.keys(TENANT)), "quotas": quotas, "used": used}
