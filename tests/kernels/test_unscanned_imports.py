"""Imports are not scanned for garbage; whatever comes after them is."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest

from lora_kernels.process import unscanned_imports


@pytest.mark.parametrize(("importing", "is_scanned"), [(unscanned_imports, False), (nullcontext, True)])
def test_objects_made_while_importing_cause_no_scan(importing: type[nullcontext[None]], is_scanned: bool) -> None:
    scans: list[str] = []

    def on_scan(phase: str, _: object) -> None:
        scans.append(phase)

    gc.callbacks.append(on_scan)
    try:
        with importing():
            kept = [[index] for index in range(100_000)]
            was_scanned = bool(scans)
    finally:
        gc.callbacks.remove(on_scan)
    assert len(kept) == 100_000
    assert was_scanned is is_scanned


def test_garbage_is_looked_for_again_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), unscanned_imports():
        raise ImportError
    assert gc.isenabled()
