"""What a store with its blobs in an object store has besides a plain one: the bucket, the disk cache, the locks."""

from __future__ import annotations

from pathlib import Path

from adapters_store.errors import StoreError
from adapters_store.remote.bucket import Bucket
from adapters_store.remote.disk_cache import DiskCache
from adapters_store.remote.settings import RemoteSettings
from adapters_store.storage.blobs import RESERVE_BYTES
from adapters_store.storage.database import Database
from adapters_store.storage.locks import locks_for
from adapters_store.storage.store_id import FILE_NAME


class Remote:
    """Safe from many threads. locks: held shared by what publishes, alone by what removes objects. leader: held by the
    one server that sweeps."""

    def __init__(
        self,
        settings: RemoteSettings,
        bucket: Bucket,
        database: Database,
        data_dir: Path,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self.settings = settings
        self.bucket = bucket
        self.cache = DiskCache(data_dir, settings.cache_bytes, reserve_bytes)
        self.locks = locks_for(database.engine, data_dir, "objects.lock")
        self.leader = locks_for(database.engine, data_dir, "sweep.lock")
        self._store_id = database.pair.store_id

    def require_ours(self) -> None:
        """Raises StoreUnavailable (blobs_unavailable)."""
        self.bucket.require_ours(self._store_id)

    def fetch(self, key: str, target: Path) -> None:
        """The cache makes room for it. Raises FileNotFoundError: it is absent from our own bucket. StoreUnavailable,
        StoreError (disk_full), OSError (of the disk)."""

        def admit(num_bytes: int) -> None:
            if not self.cache.make_room(num_bytes):
                message = f"no room for the {num_bytes} bytes of {key}: {self.cache.reserve_bytes} must stay free"
                raise StoreError("disk_full", message)

        try:
            self.bucket.get(key, target, admit)
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
