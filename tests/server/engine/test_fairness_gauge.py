"""The index over whole windows, of tenants that waited."""

from __future__ import annotations

from server.engine.metrics import FairnessGauge
from server.engine.queueing.fair_share import TenantAccount


def test_only_tenants_that_waited_all_the_window_are_compared() -> None:
    gauge = FairnessGauge(window_s=10.0)
    first, second, content = (TenantAccount(name, num_waiting=1) for name in ("first", "second", "content"))
    content.num_waiting = 0
    accounts = [first, second, content]
    assert gauge.read(accounts, 0.0) == 1.0
    first.charge(300.0)
    second.charge(100.0)
    content.charge(9e9)
    assert gauge.read(accounts, 9.9) == 1.0
    assert gauge.read(accounts, 10.0) == (300 + 100) ** 2 / (2 * (300**2 + 100**2))
    first.charge(50.0)
    second.charge(50.0)
    assert gauge.read(accounts, 20.0) == 1.0
    second.num_waiting = 0
    first.charge(50.0)
    assert gauge.read(accounts, 30.0) == 1.0


def test_a_lift_is_no_service_and_weights_count() -> None:
    gauge = FairnessGauge()
    heavy, light = TenantAccount("heavy", weight=3.0, num_waiting=1), TenantAccount("light", num_waiting=1)
    gauge.read([heavy, light], 0.0)
    heavy.charge(300.0)
    light.charge(100.0)
    light.service, light.lifted = light.service + 1e6, light.lifted + 1e6
    assert gauge.read([heavy, light], 60.0) == 1.0
