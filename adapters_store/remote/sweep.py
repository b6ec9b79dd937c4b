"""Removes from the object store what no row names, and finds what rows name and the object store lacks. Run by one
server at a time. Knows digests; is given the rows.

A blob without a row gets a mark in the bucket when a sweep first sees it. It is removed when the mark is older than the
grace by the object store's own clock, no row has come, and no publish runs. A publish that uses it removes the mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from adapters_store.errors import StoreUnavailable
from adapters_store.remote.bucket import ObjectInfo
from adapters_store.remote.keys import Area
from adapters_store.remote.remote import Remote

Referenced = Callable[[], Set[str]]
_BATCH = 50


@dataclass(slots=True)
class SweepReport:
    """removed: digests without a row. missing: digests with a row whose objects are not whole. whole: all others."""

    removed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)


def sweep(remote: Remote, area: Area, referenced: Referenced, grace_s: float) -> SweepReport | None:
    """referenced: the digests that rows name, read from a database that is proved to be the bucket's.

    None: another server sweeps. Raises StoreUnavailable (blobs_unavailable), StoreError (wrong_store).
    """
    with remote.leader.tried() as is_leader:
        return _sweep(remote, area, referenced, grace_s) if is_leader else None


def _sweep(remote: Remote, area: Area, referenced: Referenced, grace_s: float) -> SweepReport:
    remote.require_ours()
    named = referenced()  # before the listing: a publish creates the objects before the row
    objects: dict[str, list[ObjectInfo]] = {}
    for item in remote.bucket.list(area.folder):
        if (digest := area.digest_of(item.key)) is not None:
            objects.setdefault(digest, []).append(item)
    report = SweepReport()
    for digest in named:
        if len(objects.get(digest, ())) == max(1, len(area.parts)):
            report.whole.add(digest)
        elif any(remote.bucket.head(key) is None for key in area.keys(digest)):
            report.missing.append(digest)
    old = _orphans_older_than(remote, area, objects, named, grace_s)
    for start in range(0, len(old), _BATCH):
        report.removed += _remove(remote, area, old[start : start + _BATCH], referenced)
    return report


def _orphans_older_than(
    remote: Remote, area: Area, objects: dict[str, list[ObjectInfo]], named: Set[str], grace_s: float
) -> list[str]:
    """Marks those that are new; forgets marks that have become wrong."""
    bucket, now_s = remote.bucket, _now_by_bucket(remote)
    adopted_s = _adopted_s(remote)
    marks = {f"sha256:{item.key.rpartition('/')[2]}": item for item in bucket.list(f"orphans/{area.folder}")}
    for digest in [each for each in marks if each in named or each not in objects]:
        bucket.remove(area.orphan_key(digest))
        del marks[digest]
    orphans = [
        digest
        for digest, items in objects.items()
        if digest not in named and all(item.modified_s >= adopted_s for item in items)
    ]
    for digest in orphans:
        if digest not in marks and grace_s > 0:
            bucket.put_new(area.orphan_key(digest), b"")
    return [each for each in orphans if grace_s <= 0 or (each in marks and now_s - marks[each].modified_s > grace_s)]


def _remove(remote: Remote, area: Area, digests: Iterable[str], referenced: Referenced) -> list[str]:
    """Under the lock that publishes share: a row that comes now finds its objects. The mark of wholeness goes first."""
    removed = []
    with remote.locks.tried() as is_alone:
        if not is_alone:
            return []  # publishes run; the next sweep removes them
        remote.require_ours()
        named = referenced()
        for digest in digests:
            if digest not in named:
                for key in (*reversed(area.keys(digest)), area.orphan_key(digest)):
                    remote.bucket.remove(key)
                removed.append(digest)
    return removed


def _now_by_bucket(remote: Remote) -> float:
    remote.bucket.replace("sweep.json", b"{}")
    written = remote.bucket.head("sweep.json")
    if written is None:
        raise StoreUnavailable("blobs_unavailable", "the object store lost what was just written", is_away=False)
    return written.modified_s


def _adopted_s(remote: Remote) -> float:
    """What is older has no proven owner."""
    mark = remote.bucket.mark()
    return 0.0 if mark is None else float(mark.adopted_at)
