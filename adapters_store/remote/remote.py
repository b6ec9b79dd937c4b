"""What a store with its blobs in an object store has besides a plain one: the bucket, the disk cache, the locks."""

from __future__ import annotations

from pathlib import Path

from adapters_store.remote.bucket import Bucket
from adapters_store.remote.disk_cache import DiskCache
from adapters_store.remote.settings import RemoteSettings
from adapters_store.storage.database import Database
from adapters_store.storage.locks import locks_for
from adapters_store.storage.store_id import FILE_NAME


class Remote:
    """Safe from many threads. locks: held shared by what publishes, alone by what removes objects. leader: held by the
    one server that sweeps."""

    def __init__(self, settings: RemoteSettings, bucket: Bucket, database: Database, data_dir: Path) -> None:
        self.settings = settings
        self.bucket = bucket
        self.cache = DiskCache(data_dir, settings.cache_bytes)
        self.locks = locks_for(database.engine, data_dir, "objects.lock")
        self.leader = locks_for(database.engine, data_dir, "sweep.lock")
        self._store_id = database.pair.store_id

    def require_ours(self) -> None:
        """Raises StoreUnavailable (blobs_unavailable)."""
        self.bucket.require_ours(self._store_id)

    def fetch(self, key: str, target: Path) -> None:
        """Raises FileNotFoundError: it is absent from our own bucket. StoreUnavailable, OSError (of the disk)."""
        try:
            self.bucket.get(key, target)
        except FileNotFoundError:
            self.require_ours()
            raise


def open_bucket(settings: RemoteSettings | None, data_dir: Path) -> Bucket | None:
    """The bucket, proved to honour create-only writes when this directory opens it first.

    Raises StoreError (bad_blob_url, blobs_unsupported), StoreUnavailable (blobs_unavailable).
    """
    if settings is None:
        return None
    bucket = Bucket.at(settings.url)
    if not (data_dir / FILE_NAME).exists():
        bucket.require_create_only()
    return bucket
