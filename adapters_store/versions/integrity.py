"""Checks every blob that has rows: quarantines a missing or damaged one, releases one that is whole again.

Decides what counts as damage without reading the tensors. Knows no HTTP and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import UserError
from adapters_store.format.config import parse_config
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import read_header
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.remote.keys import ADAPTERS
from adapters_store.remote.remote import Remote
from adapters_store.remote.sweep import sweep
from adapters_store.storage.blobs import Blobs
from adapters_store.versions.quarantine import OF_THE_BLOB, Quarantine

Check = Callable[[AdapterDigest], None]  # raises UserError or OSError for a blob that is not whole


@dataclass(slots=True)
class IntegrityReport:
    """quarantined: digests that are not served from now on. restored: those that are served again."""

    num_blobs: int = 0
    quarantined: list[AdapterDigest] = field(default_factory=list)
    restored: list[AdapterDigest] = field(default_factory=list)


def check_of_files(blobs: Blobs, limits: AdapterLimits) -> Check:
    """Both files are there, the config reads, and the weights have exactly the bytes that their header says."""

    def check(digest: AdapterDigest) -> None:
        folder = blobs.folder(digest)
        parse_config((folder / CONFIG_FILE).read_bytes(), limits)
        read_header(folder / WEIGHTS_FILE, limits)

    return check


def check_integrity(
    digests: Callable[[], Iterable[AdapterDigest]], blobs: Blobs, quarantine: Quarantine, check: Check
) -> IntegrityReport:
    """digests: returns those with rows; called again before a blob counts as damaged. Raises StoreError (disk_full,
    read_only) if the result cannot be recorded."""
    held = {entry.digest for entry in quarantine.entries() if entry.code in OF_THE_BLOB}
    every = list(digests())
    found = IntegrityReport(num_blobs=len(every))
    suspects = [digest for digest in every if _fault(blobs, check, digest) is not None]
    found.restored = [digest for digest in held.difference(suspects).intersection(every) if quarantine.heal(digest)]
    if suspects:
        with blobs.settled():  # a blob that is being replaced or deleted is not damaged
            owned = set(digests())
            faults = {digest: _fault(blobs, check, digest) for digest in suspects if digest in owned}
        for digest, fault in faults.items():
            if fault is not None and quarantine.put(digest, *fault):
                found.quarantined.append(digest)
    return found


def check_remote(
    remote: Remote,
    referenced: Callable[[], set[str]],
    quarantine: Quarantine,
    quarantine_blob: Callable[[AdapterDigest, str, str], None],
    grace_s: float | None,
) -> list[AdapterDigest]:
    """Sweep the object store, and quarantine what rows name and it lacks; returns what was removed.

    referenced: the digests with rows. quarantine_blob: logs what prevents it. grace_s None: the settings'.
    """
    found = sweep(remote, ADAPTERS, referenced, remote.settings.grace_s if grace_s is None else grace_s)
    if found is None:
        return []
    for digest in found.missing:
        if digest in referenced():
            quarantine_blob(AdapterDigest(digest), "blob_missing", "its files are missing")
    for entry in quarantine.entries():
        if entry.code == "blob_missing" and entry.digest in found.whole:
            quarantine.heal(entry.digest)
    return [AdapterDigest(digest) for digest in found.removed]


def _fault(blobs: Blobs, check: Check, digest: AdapterDigest) -> tuple[str, str] | None:
    """Code and message."""
    try:
        check(digest)
    except FileNotFoundError as error:
        return "blob_missing", f"{_name(error.filename, blobs.folder(digest))} is missing"
    except OSError as error:
        return "blob_damaged", f"cannot be read: {error.strerror or error}"
    except UserError as error:
        return "blob_missing" if error.code == "missing_weights" else "blob_damaged", error.message
    return None


def _name(missing: object, folder: Path) -> str:
    return Path(str(missing)).name if folder.exists() else "its folder"
