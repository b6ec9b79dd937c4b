"""Checks every blob that has rows: quarantines a missing or damaged one, releases one that is whole again.

Decides what counts as damage without reading the tensors. Knows no HTTP and no device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterRejected
from adapters_store.format.config import parse_config
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import read_header
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.remote.keys import ADAPTERS
from adapters_store.remote.remote import Remote
from adapters_store.remote.sweep import sweep
from adapters_store.storage.blobs import Blobs
from adapters_store.versions.quarantine import OF_THE_BLOB, Quarantine

# What accepted bytes never give. Any other refusal is of this version, and another may serve the adapter.
DAMAGE = frozenset(
    {
        "digest_mismatch",
        "non_finite",
        "cast_overflow",
        "missing_weights",
        "truncated",
        "trailing_bytes",
        "bad_offsets",
        "overlapping_offsets",
        "offsets_gap",
        "header_too_large",
        "git_lfs_pointer",
        "pickle",
        "unsupported_format",
        "bad_header",
        "bad_tensor_name",
        "bad_shape",
        "no_tensors",
        "not_utf8",
        "bad_json",
        "duplicate_key",
        "nan_literal",
    }
)


@dataclass(slots=True)
class IntegrityReport:
    """quarantined: digests that are not served from now on. restored: those that are served again."""

    num_blobs: int = 0
    quarantined: list[AdapterDigest] = field(default_factory=list)
    restored: list[AdapterDigest] = field(default_factory=list)


def check_integrity(
    digests: Callable[[], set[AdapterDigest]],
    blobs: Blobs,
    quarantine: Quarantine,
    limits: AdapterLimits,
    is_whole: Callable[[AdapterDigest], bool],
) -> IntegrityReport:
    """A blob is whole if both files are there, the config reads, and the weights have the bytes that their header says.

    digests: returns those with rows; called again before a blob counts as damaged. is_whole: reads all bytes of one
    that is in quarantine: a load may have found damage that no header shows. Raises StoreError (disk_full, read_only)
    if the result cannot be recorded.
    """
    held = {entry.digest for entry in quarantine.entries() if entry.code in OF_THE_BLOB}
    every = sorted(digests())
    found = IntegrityReport(num_blobs=len(every))
    suspects = [digest for digest in every if _fault(blobs, limits, digest) is not None]
    found.restored = [
        digest
        for digest in held.difference(suspects).intersection(every)
        if is_whole(digest) and quarantine.heal(digest)
    ]
    if suspects:
        with blobs.settled():  # a blob that is being replaced or deleted is not damaged
            owned = digests()
            faults = {digest: _fault(blobs, limits, digest) for digest in suspects if digest in owned}
        for digest, fault in faults.items():
            if fault is not None and quarantine.put(digest, *fault):
                found.quarantined.append(digest)
    return found


def check_remote(
    remote: Remote,
    referenced: Callable[[], set[AdapterDigest]],
    quarantine: Quarantine,
    grace_s: float | None,
) -> list[AdapterDigest]:
    """Sweep the object store, and quarantine what rows name and it lacks; returns what was removed.

    referenced: the digests with rows. grace_s None: the settings'.
    """
    found = sweep(remote, ADAPTERS, referenced, remote.settings.grace_s if grace_s is None else grace_s)
    if found is None:
        return []
    owned = referenced() if found.missing else set()  # again: deleted while the sweep ran
    for digest in found.missing:
        if digest in owned:
            quarantine.try_put(AdapterDigest(digest), "blob_missing", "its files are missing")
    for entry in quarantine.entries():
        if entry.code == "blob_missing" and entry.digest in found.whole:
            quarantine.heal(entry.digest)
    return [AdapterDigest(digest) for digest in found.removed]


def _fault(blobs: Blobs, limits: AdapterLimits, digest: AdapterDigest) -> tuple[str, str] | None:
    """Code and message."""
    folder = blobs.folder(digest)
    try:
        parse_config((folder / CONFIG_FILE).read_bytes(), limits)
        read_header(folder / WEIGHTS_FILE, limits)
    except FileNotFoundError:
        return "blob_missing", f"{CONFIG_FILE if folder.exists() else 'its folder'} is missing"
    except OSError as error:
        return "blob_damaged", f"cannot be read: {error.strerror or error}"
    except AdapterRejected as error:
        if error.code not in DAMAGE:
            return None
        return "blob_missing" if error.code == "missing_weights" else "blob_damaged", error.message
    return None
