"""Decides where an adapter is read from, its packed form or the upload, and what happens if it cannot be. Knows files
and the base that an adapter belongs to; knows no names.
"""

from __future__ import annotations

from functools import partial

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.errors import AdapterRejected, AdapterUnavailable, BlobDamaged, NotFound, UserError
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.format.limits import AdapterLimits
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.mix import parts_of
from adapters_store.packed.mixing import mixed
from adapters_store.packed.packed_file import keep_packed, read_packed
from adapters_store.packed.packing import pack
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from adapters_store.storage.blobs import Blobs
from adapters_store.storage.database import Database
from adapters_store.versions import registry
from adapters_store.versions.integrity import DAMAGE
from adapters_store.versions.quarantine import Quarantine
from lora_kernels.background import Later, Pace, TimeSlices


class AdapterLoader:
    """Reads the adapters of one data directory. Safe to use from many threads.

    limits: of stored adapters, so wider than those for new uploads.
    """

    def __init__(self, database: Database, blobs: Blobs, quarantine: Quarantine, limits: AdapterLimits) -> None:
        self._database = database
        self._blobs = blobs
        self._quarantine = quarantine
        self._limits = limits

    def load(
        self, digest: AdapterDigest, base: BaseDescription, buffers: HostBuffers, slices: TimeSlices, later: Later
    ) -> PackedAdapter:
        """Read the packed form. If it is missing or damaged, read the upload; `later` is given the work of writing the
        packed form again. A mix is read part by part, and added in memory."""
        if parts := parts_of(digest):
            loaded = [(self.load(each, base, HostBuffers(), slices, later), weight) for each, weight in parts]
            return mixed(digest, loaded, base, buffers, slices)
        packed = read_packed(self._blobs.folder(digest), digest, base, buffers=buffers, slices=slices)
        if packed is None:
            packed = self.load_upload(digest, base, buffers)
            later(partial(self.keep, packed, base))
        return packed

    def load_upload(
        self, digest: AdapterDigest, base: BaseDescription, buffers: HostBuffers | None = None
    ) -> PackedAdapter:
        """From the files as they were uploaded, read whole and compared with the digest."""
        self._require_base(digest, base)
        try:
            return self._read(digest, base, buffers)
        except (AdapterRejected, OSError):
            return self._load_settled(digest, base, buffers)

    def is_intact(self, digest: AdapterDigest, base: BaseDescription) -> bool:
        """Whether the uploaded files are there and have this digest."""
        try:
            self._read(digest, base)
        except (UserError, OSError):
            return False
        return True

    def keep(self, packed: PackedAdapter, base: BaseDescription, pace: Pace) -> None:
        """Write the packed form, if there is room: it makes the next load faster."""
        if self._blobs.has_room(packed.num_bytes):
            keep_packed(self._blobs.folder(packed.digest), packed, base, pace)
            self._blobs.added(packed.digest, packed.num_bytes)

    def _load_settled(self, digest: AdapterDigest, base: BaseDescription, buffers: HostBuffers | None) -> PackedAdapter:
        """Check again under the lock: a blob that was being replaced or deleted is not damaged. A copy in a cache is
        fetched again, and is never the reason that an adapter is called missing."""
        self._blobs.refresh(digest)
        with self._blobs.settled():
            self._require_base(digest, base)
            try:
                return self._read(digest, base, buffers)
            except AdapterRejected as error:
                if error.code not in DAMAGE:
                    raise AdapterUnavailable(error.code, f"{digest}: {error.message}", param="model") from error
                self._quarantine.try_put(digest, "blob_damaged", error.message)
                raise BlobDamaged("blob_damaged", f"{digest}: {error.message}", param="model") from error
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not self._blobs.head(digest):
                    self._quarantine.try_put(digest, "blob_missing", "its files are missing")
                raise BlobDamaged("blob_unreadable", f"{digest}: {error.strerror or error}", param="model") from error

    def _read(self, digest: AdapterDigest, base: BaseDescription, buffers: HostBuffers | None = None) -> PackedAdapter:
        folder = self._blobs.get(digest)
        plan = plan_folder(folder, base, self._limits)
        packed = pack(plan, folder / WEIGHTS_FILE, buffers=buffers)
        if packed.digest != digest:
            raise AdapterRejected("digest_mismatch", f"the files have digest {packed.digest}")
        return packed

    def _require_base(self, digest: AdapterDigest, base: BaseDescription) -> None:
        with self._database.read() as connection:
            found = registry.base_of(connection, digest)
        if found is None:
            raise NotFound("model_not_found", f"no adapter has digest {digest}", param="model")
        if found != base.digest:
            message = f"{digest}: belongs to base {found}, asked for on base {base.digest}"
            raise AdapterUnavailable("wrong_base", message, param="model")
