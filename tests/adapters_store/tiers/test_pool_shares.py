"""Which adapters are evicted when the device is full: those beyond a tenant's share first, never its only one."""

from __future__ import annotations

import pytest

from adapters_store.tiers.device_pool import DevicePool, DevicePoolSettings
from adapters_store.tiers.entries import NO_OWNER, Owner
from support.worlds.adapter_memory import FakeClock, digest_of

CYCLER, LAW, MED = Owner("cycler"), Owner("law"), Owner("med")


class Bench:
    """A device for ten adapters of 10 elements."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        settings = DevicePoolSettings(capacity_elements=100, max_slots=32, alignment_elements=1, hold_s=10.0)
        self.pool = DevicePool(settings, self.clock)

    def bring(self, name: str, owner: Owner, size: int = 10, *, used: bool = False) -> list[str] | None:
        """Names of the evicted adapters; None if there was no room."""
        self.clock.advance(0.01)
        reservation = self.pool.reserve(digest_of(name), size, owner=owner)
        if reservation is None:
            return None
        self.pool.mark_ready(reservation.entry)
        if used:
            self.pool.acquire(digest_of(name))
        return [victim.digest.removeprefix("sha256:") for victim in reservation.evicted]

    def resident(self, owner: Owner) -> int:
        return sum(entry.owner == owner for entry in self.pool.entries())


def test_a_tenant_that_goes_through_hundreds_of_adapters_evicts_its_own() -> None:
    bench = Bench()
    for index in range(3):
        bench.bring(f"law{index}", LAW)
        bench.bring(f"med{index}", MED)
    for index in range(900):  # in 9 of the 10 s for which the others keep theirs
        gone = bench.bring(f"c{index}", CYCLER)
        assert gone is not None
        assert all(name.startswith("c") for name in gone)
    assert (bench.resident(LAW), bench.resident(MED), bench.resident(CYCLER)) == (3, 3, 4)


def test_without_owners_the_longest_unused_goes() -> None:
    bench = Bench()
    for index in range(12):
        bench.bring(f"a{index}", NO_OWNER)
    assert [entry.digest for entry in bench.pool.entries()] == [digest_of(f"a{index}") for index in range(2, 12)]


def test_what_nobody_used_for_a_while_is_free_for_all() -> None:
    bench = Bench()
    for index in range(5):
        bench.bring(f"law{index}", LAW)
    for index in range(5):
        bench.bring(f"c{index}", CYCLER)
    assert bench.bring("c5", CYCLER) == ["c0"]
    bench.clock.advance(10.5)
    assert bench.bring("c6", CYCLER) == ["law0"]


def test_a_tenant_that_holds_too_much_gives_way_to_one_that_holds_nothing() -> None:
    bench = Bench()
    bench.bring("law0", LAW)
    for index in range(9):
        bench.bring(f"c{index}", CYCLER)
    assert bench.bring("med0", MED) == ["c0"]


def test_weights_divide_the_room() -> None:
    bench, rich = Bench(), Owner("rich", 4.0)
    for index in range(8):
        bench.bring(f"rich{index}", rich)
    for index in range(2):
        bench.bring(f"law{index}", LAW)
    assert bench.bring("law2", LAW) == ["law0"]
    assert bench.bring("rich8", rich) == ["rich0"]


def test_an_only_adapter_larger_than_the_share_is_let_in_and_not_the_first_to_go() -> None:
    bench = Bench()
    for index in range(6):
        bench.bring(f"c{index}", CYCLER)
    assert bench.bring("big", LAW, size=70) is not None
    assert bench.resident(LAW) == 1
    assert bench.bring("c9", CYCLER) is not None
    assert bench.resident(LAW) == 1


def test_one_beyond_its_share_waits_while_its_own_adapters_run() -> None:
    bench = Bench()
    for index in range(5):
        bench.bring(f"law{index}", LAW)
        bench.bring(f"c{index}", CYCLER, used=True)
    assert bench.bring("c5", CYCLER) is None
    assert bench.pool.shares([LAW]).over_share_tenants() == frozenset()
    bench.pool.release(digest_of("c0"))
    assert bench.bring("c5", CYCLER) == ["c0"]


@pytest.mark.parametrize("num_used", [6, 4])
def test_crowding_are_those_whose_running_requests_hold_more_than_the_share(num_used: int) -> None:
    bench = Bench()
    for index in range(num_used):
        bench.bring(f"c{index}", CYCLER, used=True)
    assert bench.pool.shares([CYCLER, LAW]).over_share_tenants() == (
        frozenset({"cycler"}) if num_used == 6 else frozenset()
    )
