"""Prepares the store before a server serves: removes left-overs, checks every blob, deletes old audit rows.

A disk that is full or read-only gives a warning; the server still serves what is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from adapters_store.errors import StoreError
from adapters_store.storage.blobs import disk_full_is_an_answer
from adapters_store.store import AdapterStore
from server.cli.common.output import Output

_OF_THE_DISK = ("disk_full", "read_only")
_MAX_SHOWN = 20


def prepare(store: AdapterStore, output: Output) -> None:
    """Raises StoreError and OSError for anything but a disk that cannot take more."""
    for step in (_sweep, _check, _prune):
        where_the_disk_allows(lambda step=step: step(store, output), output)  # type: ignore[misc]


def _sweep(store: AdapterStore, output: Output) -> None:
    swept = store.sweep()
    if swept.num_staged or swept.blobs or swept.num_packed:
        output.event("swept", staged=swept.num_staged, blobs=swept.blobs, packed=swept.num_packed)
        output.say(
            f"removed left-overs: {swept.num_staged} staged files, {len(swept.blobs)} blobs, "
            f"{swept.num_packed} files of packed forms",
            style="dim",
        )


def _check(store: AdapterStore, output: Output) -> None:
    start_s = time.perf_counter()
    found = store.check_integrity()
    kept_out = store.quarantine.entries()
    duration_s = round(time.perf_counter() - start_s, 3)
    output.event(
        "store_checked",
        blobs=found.num_blobs,
        quarantined={entry.digest: entry.code for entry in kept_out[:_MAX_SHOWN]},
        num_quarantined=len(kept_out),
        restored=found.restored,
        duration_s=duration_s,
    )
    for entry in kept_out[:_MAX_SHOWN]:
        to_whom = "" if entry.tenant is None else f" to {entry.tenant}"
        output.say(f"not served{to_whom}: {entry.digest} ({entry.code}: {entry.message})", style="yellow")
    if len(kept_out) > _MAX_SHOWN:
        output.say(f"and {len(kept_out) - _MAX_SHOWN} more: multilora quarantine list", style="yellow")


def _prune(store: AdapterStore, _output: Output) -> None:
    store.audit.prune()


def where_the_disk_allows(action: Callable[[], None], output: Output) -> None:
    """Run the action, or warn that the disk takes no more."""
    try:
        with disk_full_is_an_answer():
            action()
    except StoreError as error:
        if error.code not in _OF_THE_DISK:
            raise
        output.event("warning", code=error.code, message=error.message)
        output.say(f"{error.code}: {error.message}", style="yellow")
