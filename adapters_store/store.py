"""The adapter store as the rest of the product sees it: publish, resolve, list, delete, load.

Ties the parts together and decides their order: check, stage, digest, blob, row. Knows no HTTP and no device.
Safe to use from many threads, and from several processes on one data directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapters_store.accounts.quotas import QuotaStore
from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.accounts.tenants import TenantStore
from adapters_store.accounts.usage import UsageStore
from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.errors import AdapterRejected, NotFound
from adapters_store.filesystem import Filesystem
from adapters_store.fleet.change_feed import ChangeFeed
from adapters_store.fleet.serving_base import serving_base
from adapters_store.format.adapter_folder import plan_files
from adapters_store.format.chat_fields import TEMPLATE_FIELD, check_template_renders, with_own_fields
from adapters_store.format.limits import AdapterLimits
from adapters_store.loader import AdapterLoader
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.int8_check import Int8Change, check_int8
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.mix import needs
from adapters_store.packed.packed_file import sweep_packed
from adapters_store.packed.packing import pack
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from adapters_store.remote.object_blobs import ObjectBlobs
from adapters_store.remote.remote import Remote, open_bucket
from adapters_store.remote.settings import RemoteSettings
from adapters_store.storage.answer_cache import AnswerCache
from adapters_store.storage.audit import AuditLog
from adapters_store.storage.availability import DEFAULT_GRACE_S
from adapters_store.storage.blobs import RESERVE_BYTES, Blobs
from adapters_store.storage.database import POLL_S, Database
from adapters_store.storage.locks import locks_for
from adapters_store.storage.names import check_name, split_ref
from adapters_store.versions import registry
from adapters_store.versions.aliases import AliasStore, choose, meaning_of
from adapters_store.versions.integrity import IntegrityReport, check_integrity, check_remote
from adapters_store.versions.quarantine import Quarantine, heal
from adapters_store.versions.records import AdapterVersion
from adapters_store.versions.served_names import ServedNames
from lora_kernels.background import Later, TimeSlices

_MAX_TEMPLATES = 256


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What a sweep removed: folders of killed uploads, blobs without a row, and files of packed forms."""

    num_staged: int
    blobs: list[AdapterDigest]
    num_packed: int = 0


class AdapterStore:
    """One data directory and its database. Made by `open`. database: also for callers with tables of their own."""

    def __init__(self, database: Database, blobs: Blobs, limits: AdapterLimits, remote: Remote | None = None) -> None:
        self.database = database
        self._blobs = blobs
        self.remote = remote
        self._limits = limits
        self._resolved: AnswerCache[tuple[str, str], tuple[AdapterVersion, ...]] = database.answers()
        self._templates: dict[str, str] = {}  # by digest
        self.aliases = AliasStore(database)
        self.usage = UsageStore(database)
        self.quotas = QuotaStore(database)
        self.served_names = ServedNames(database)
        self.tenants = TenantStore(database, self._drop_unreferenced)
        self.audit = AuditLog(database)
        self.quarantine = Quarantine(database)
        # Lowered limits hold for new uploads only.
        self._kept_limits = replace(
            limits, max_rank=1 << 20, max_bytes=1 << 62, max_tensors=1 << 20, max_header_bytes=1 << 28
        )
        self._loader = AdapterLoader(database, blobs, self.quarantine, self._kept_limits)
        # Brings an adapter's files from the object store to this disk; None: they are nowhere else.
        self.fetch: Callable[[AdapterDigest], object] | None = self._fetch if blobs.is_remote else None

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        database_url: str | None = None,
        limits: AdapterLimits | None = None,
        files: Filesystem | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        grace_s: float = DEFAULT_GRACE_S,
        poll_s: float = POLL_S,
        remote: RemoteSettings | None = None,
    ) -> AdapterStore:
        """Open or make the store in `data_dir`. remote: the object store that holds the blobs, if `data_dir` does not.

        grace_s: how long remembered answers count while the database does not answer. poll_s: see Database. Raises
        StoreError: wrong_store (the database is another directory's), database_newer (a later program wrote it), and
        what `open_bucket` raises.
        """
        files = files or Filesystem()
        files.make_folder(data_dir)
        bucket = open_bucket(remote, data_dir)
        database = Database(data_dir, database_url, grace_s=grace_s, poll_s=poll_s, bucket=bucket)
        limits = limits or AdapterLimits()
        if remote is None or bucket is None:
            locks = locks_for(database.engine, data_dir, "blobs.lock")
            return cls(database, Blobs(data_dir, files, locks, reserve_bytes=reserve_bytes), limits)
        at = Remote(remote, bucket, database, data_dir, reserve_bytes)
        return cls(database, ObjectBlobs(data_dir, files, at), limits, at)

    @contextmanager
    def following(self) -> Iterator[None]:
        """While the block runs, other processes' changes count as soon as they are committed. On SQLite they are polled
        for, as everywhere outside of the block."""
        if not self.database.is_shared:
            yield
            return
        feed = ChangeFeed(self.database.url, self.database.sender, self.database.changed)
        feed.start()
        try:
            yield
        finally:
            feed.stop()

    def serving(self, base_digest: str, base_name: str) -> AbstractContextManager[None]:
        """While the block runs, no server with another base starts on this PostgreSQL; on SQLite nothing is checked.

        Raises Conflict (other_base_served) if one is running.
        """
        return serving_base(self.database, base_digest, base_name) if self.database.is_shared else nullcontext()

    def close(self) -> None:
        """Give the database connections back."""
        self.database.close()

    def publish(
        self,
        *,
        tenant: str,
        name: str,
        config: bytes,
        weights: Path,
        base: BaseDescription,
        activate: bool = True,
        takes_file: bool = False,
        tool_dialect: str | None = None,
        chat_template: str | None = None,
        adapter_dtype: str | None = None,
        int8_change: Int8Change | None = None,
    ) -> AdapterVersion:
        """Check an adapter, store its files and add its version. Nothing of a refused adapter is stored.

        The same content under the same name is no new version. activate: the bare name means it from now on.
        takes_file: `weights` is a file that the caller alone writes; the store moves it instead of copying it.
        tool_dialect, chat_template: how its chats are written. adapter_dtype: "int8"; None: the base's. They become
        part of the config, and so of the digest. int8_change: measures an int8 adapter against the same in the base's
        dtype, in nats; None: nothing here can, and int8 is refused.

        Raises:
            AdapterRejected: the upload is not one we serve exactly; see header, config_fields, config and validate.
            NotFound: tenant_not_found. Conflict: too_many_adapters. StoreError: disk_full, read_only.
            AdapterUnavailable: base_weights_missing (DoRA).
        """
        check_name("name", name)
        config = with_own_fields(config, tool_dialect, chat_template, adapter_dtype)
        plan = plan_files(config, weights, base, self._limits)
        with self.database.read() as connection:
            tenant_id(connection, tenant)
        check_template_renders(plan.chat_template)
        with self._blobs.stage(config, weights, moves=takes_file) as staged:
            # The copy is checked, because it is what is stored: the upload itself may change meanwhile.
            if plan_files(config, staged / WEIGHTS_FILE, base, self._limits) != plan:
                raise AdapterRejected("changed_while_reading", "weights: the file changed while it was read")
            packed = pack(plan, staged / WEIGHTS_FILE, check=True)
            check_int8(packed, plan, staged / WEIGHTS_FILE, int8_change)
            draft = registry.Draft(
                tenant=tenant, name=name, digest=packed.digest, plan=plan, config=config, activate=activate
            )
            limit = self._limits.max_versions_per_tenant
            with self._blobs.changing():
                with self.database.read() as connection:  # before the files are kept
                    registry.require_room(connection, draft, max_versions=limit)
                self._blobs.put_new(
                    staged,
                    packed.digest,
                    is_whole=partial(self._loader.is_intact, packed.digest, base),
                    is_damaged=partial(self.quarantine.is_of_the_blob, packed.digest),
                )
                with self.database.write() as connection:
                    heal(connection, packed.digest)
                    version = registry.add_version(connection, draft, max_versions=limit)
        self._loader.keep(packed, base, TimeSlices())
        return version

    def resolve(self, tenant: str, ref: str, sticky: str | None = None) -> AdapterVersion:
        """ "name" -> its active version or, for some values of `sticky`, a canary; "name@3" -> that version.

        Cheap enough for every request. This process's writes count at once, another's within a second.
        Raises NotFound (model_not_found, adapter_unloaded).
        """
        return choose(self._resolved.get((tenant, ref), self._find), sticky)

    def _fetch(self, digest: AdapterDigest) -> None:
        for needed in needs(digest):
            self._blobs.get(needed)

    def _find(self, key: tuple[str, str]) -> tuple[AdapterVersion, ...]:
        with self.database.read() as connection:
            return meaning_of(connection, *key)

    def forget_answers(self) -> None:
        """Ask the database again for what `resolve` remembers."""
        self._resolved.clear()

    def not_in_service(self, digests: list[AdapterDigest]) -> list[AdapterDigest]:
        """Those of `digests` that were deleted, or that all their owners unloaded; mixes with such a part."""
        with self.database.read() as connection:
            gone = {*registry.not_in_service(connection, [part for digest in digests for part in needs(digest)])}
        return [digest for digest in dict.fromkeys(digests) if not gone.isdisjoint(needs(digest))]

    def list_versions(self, tenant: str | None = None) -> list[AdapterVersion]:
        """The active versions of one tenant, or of all."""
        with self.database.read() as connection:
            return registry.find_versions(connection, tenant=tenant, active_only=True)

    def versions(self, tenant: str, name: str) -> list[AdapterVersion]:
        """Every version of a name, oldest first; empty if there is none."""
        with self.database.read() as connection:
            return registry.find_versions(connection, tenant=tenant, name=name)

    def delete(self, tenant: str, ref: str) -> list[AdapterDigest]:
        """Delete "name@3", or all versions of "name"; returns the digests no longer referenced by anyone.

        Their files are gone when this returns. If the active version is deleted, the bare name means nothing. Version
        numbers are never reused. Raises NotFound (model_not_found).
        """
        name, number = split_ref(ref)
        with self.database.write() as connection:
            digests = registry.delete_versions(connection, tenant, name, number)
        return self._drop_unreferenced(digests)

    def load_packed(
        self,
        digest: AdapterDigest,
        base: BaseDescription,
        *,
        buffers: HostBuffers | None = None,
        slices: TimeSlices | None = None,
        later: Later = lambda work: work(TimeSlices()),
    ) -> PackedAdapter:
        """Read an adapter into one buffer in device layout.

        The packed form is read and checked against its checksum. If it is missing, damaged or of another layout, the
        upload is read, checked against the digest and packed again. buffers: the source of the memory; None: new.
        slices: when the packed form may be read; None: at once. later: is given what may be done after the return.

        Raises:
            NotFound: model_not_found. BlobDamaged: blob_damaged, blob_unreadable.
            NotCombinable: adapters_not_combinable, for a mix.
            AdapterUnavailable: wrong_base (it belongs to another base than this), or the code by which `publish` would
                refuse it now: another version took it. It is not quarantined.
        """
        return self._loader.load(digest, base, buffers or HostBuffers(), slices or TimeSlices(), later)

    def verify(self, digest: AdapterDigest, base: BaseDescription) -> None:
        """Read the uploaded files whole and compare them with the digest. Raises as `load_packed`."""
        self._loader.load_upload(digest, base)

    def config_of(self, version: AdapterVersion) -> bytes:
        """The adapter_config.json as it was uploaded for this version. Raises NotFound (model_not_found)."""
        with self.database.read() as connection:
            config = registry.config_of(connection, version)
        if config is None:
            raise NotFound("model_not_found", f"no adapter {version.ref} for tenant {version.tenant}", param="model")
        return config

    def chat_template_of(self, version: AdapterVersion) -> str | None:
        """Its own chat template. Raises NotFound (model_not_found)."""
        if version.chat_template is None:
            return None
        found = self._templates.get(version.chat_template)
        if found is None:
            found = str(json.loads(self.config_of(version))[TEMPLATE_FIELD])
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            self._templates[version.chat_template] = found
        return found

    def weights_of(self, digest: AdapterDigest) -> Path:
        """The path of a digest's adapter_model.safetensors; read only."""
        return self._blobs.get(digest) / WEIGHTS_FILE

    def remember_base(self, base: BaseDescription) -> None:
        """Remember the served base, so that adapters can be pushed while no server runs."""
        with self.database.write() as connection:
            registry.remember_base(connection, base)

    def bases(self) -> list[BaseDescription]:
        """Every remembered base, newest first."""
        with self.database.read() as connection:
            return registry.all_bases(connection)

    def sweep(self, grace_s: float = 3600) -> CleanupReport:
        """Remove what killed processes left: staged copies, blobs without a row and half written packed forms, older
        than the grace. Also packed forms that fit no base remembered here, once no load uses them: see `sweep_packed`.

        The grace must be longer than a publish takes, since a staged copy does not show if its process still runs.
        Raises StoreError (wrong_store) if the rows are not proved to be this directory's.
        """
        is_left_over = partial(self.database.pair.is_left_over, grace_s=grace_s)
        with self._blobs.changing(), self.database.proven() as connection:
            orphans = registry.unreferenced(connection, self._blobs.list())
            removed = self._blobs.remove_old(orphans, is_left_over)
        layouts = {base.layout_key for base in self.bases()}
        num_packed = sum(sweep_packed(folder, layouts, grace_s) for folder in self._blobs.folders())
        return CleanupReport(self._blobs.remove_old_staging(is_left_over), [*removed], num_packed)

    def sweep_remote(self, grace_s: float | None = None) -> CleanupReport:
        """The same in an object store, if there is one; see `check_remote`. Raises StoreError as its bucket does."""
        if self.remote is None:
            return CleanupReport(0, [])
        return CleanupReport(0, check_remote(self.remote, self._referenced, self.quarantine, grace_s))

    def _referenced(self) -> set[AdapterDigest]:
        with self.database.proven() as connection:
            return set(registry.all_digests(connection))

    def require_room(self, num_bytes: int) -> None:
        """Raises StoreError (disk_full)."""
        self._blobs.require_room(num_bytes)

    def has_room(self, num_bytes: int) -> bool:
        """If `num_bytes` more leave the data directory the room that its database needs."""
        return self._blobs.has_room(num_bytes)

    def check_integrity(self) -> IntegrityReport:
        """Check that every version's files exist and have their length; see `integrity`.

        With an object store there is nothing to check here: a copy in the cache is checked when it is loaded, and
        `sweep_remote` looks at the object store. Raises StoreError (disk_full, read_only) if the result cannot be
        recorded.
        """
        if self.remote is not None:
            return IntegrityReport()

        return check_integrity(
            self._referenced, self._blobs, self.quarantine, self._kept_limits, is_whole=self._has_its_digest
        )

    def _has_its_digest(self, digest: AdapterDigest) -> bool:
        """Of uploaded files that are there. Without their base no digest can be made, and they are believed."""
        with self.database.read() as connection:
            own = registry.base_of(connection, digest)
            base = next((each for each in registry.all_bases(connection) if each.digest == own), None)
        return base is None or self._loader.is_intact(digest, base)

    def quarantine_adapter(self, digest: AdapterDigest, code: str, message: str, *, tenant: str | None = None) -> None:
        """Serve this adapter no more, to the tenant or to all. What keeps that from being written down is logged: the
        caller has to continue."""
        self.quarantine.try_put(digest, code, message, tenant=tenant)

    def _drop_unreferenced(self, digests: list[AdapterDigest]) -> list[AdapterDigest]:
        with self._blobs.changing():
            with self.database.proven() as connection:
                orphans = registry.unreferenced(connection, digests)
            for digest in orphans:
                self._blobs.remove(digest)
        return orphans
