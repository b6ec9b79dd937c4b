"""What uploads of adapters and of files share: a slot, a spool file, the parsed form. Knows no rule of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from adapters_store.errors import NotFound
from adapters_store.storage.blobs import disk_full_is_an_answer
from server.api.context import ApiContext
from server.api.edge.upload_slots import Incoming
from server.api.wire.multipart import Upload, UploadParser, boundary_of


@asynccontextmanager
async def upload_slot(context: ApiContext, tenant: str) -> AsyncIterator[tuple[Incoming, Path]]:
    """A slot, and the path of a spool file, for the length of an upload.

    Raises ApiError 429 if too many uploads are running, StoreError (disk_full, read_only, data_dir_gone) for what the
    disk refuses meanwhile.
    """
    try:
        with context.upload_slots.taken(tenant) as incoming, disk_full_is_an_answer():
            spool = await run_in_threadpool(_spool_path, context)
            try:
                yield incoming, spool
            finally:
                await run_in_threadpool(spool.unlink, missing_ok=True)
    except OSError:
        context.store.database.pair.require_folder()
        raise


def _spool_path(context: ApiContext) -> Path:
    """A new file's name. Files older than the longest upload were left by a killed server; they are deleted.

    Raises StoreUnavailable (data_dir_gone).
    """
    settings, store = context.settings, context.store
    store.database.pair.require_folder()
    folder = settings.data_dir / "uploads"
    folder.mkdir(mode=0o700, exist_ok=True)
    for entry in folder.iterdir():
        if store.database.pair.is_left_over(entry, settings.upload_timeout_s + settings.idle_timeout_s):
            entry.unlink(missing_ok=True)  # another upload may just have ended
    return folder / f"{uuid4().hex}.part"


async def receive(
    request: Request,
    spool: Path,
    limits: Mapping[str, int],
    *,
    file_part: str,
    incoming: Incoming,
    optional: Container[str] = (),
) -> Upload:
    """The form's small fields; `file_part` goes into the spool file. limits: the most bytes of each part, by name;
    those in `optional` may be absent."""
    boundary = boundary_of(request.headers.get("content-type", ""))
    with await run_in_threadpool(UploadParser, boundary, spool, limits, file_part, optional) as parser:

        def take(chunk: bytes) -> None:
            incoming.arrived(len(chunk))
            parser.feed(chunk)

        await run_in_threadpool(incoming.claim, _announced(request))
        async for chunk in request.stream():
            await run_in_threadpool(take, chunk)
        return await run_in_threadpool(parser.finish)


def _announced(request: Request) -> int:
    """The body's size by Content-Length; 0 without one."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def ensure_tenant(context: ApiContext, tenant: str) -> None:
    """With auth off a tenant exists from its first upload on."""
    if context.settings.auth != "off":
        return
    try:
        context.store.tenants.get(tenant)
    except NotFound:
        context.store.tenants.create(tenant)
