"""What adapters and files have in common on their way in: a slot, a spool file, the form taken apart. Knows no store's
rules."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import anyio
from fastapi import Request

from adapters_store.blobs import disk_full_is_an_answer
from adapters_store.errors import NotFound
from server.api.context import ApiContext, off_loop
from server.api.errors import ApiError
from server.api.multipart import Upload, UploadParser, boundary_of
from server.api.settings import ApiSettings


@contextmanager
def upload_slot(context: ApiContext) -> Iterator[None]:
    """For the length of an upload. Raises ApiError 429 where too many are coming in already, StoreError (disk_full,
    read_only) for what the disk refuses meanwhile."""
    borrower = object()
    try:
        context.upload_slots.acquire_on_behalf_of_nowait(borrower)
    except anyio.WouldBlock:
        message = f"{context.settings.max_uploads} uploads are in progress, which is the limit; try again later."
        raise ApiError(429, "too_many_uploads", message, retry_after_s=2.0) from None
    try:
        with disk_full_is_an_answer():
            yield
    finally:
        context.upload_slots.release_on_behalf_of(borrower)


def spool_path(settings: ApiSettings) -> Path:
    """A new file's name. Files older than any upload may last were left by a server that was killed; they go."""
    folder = settings.data_dir / "uploads"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    oldest_s = time.time() - settings.upload_timeout_s - settings.idle_timeout_s
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another upload has just ended
            if entry.stat().st_mtime < oldest_s:
                os.unlink(entry)
    return folder / f"{uuid4().hex}.part"


async def receive(request: Request, spool: Path, limits: Mapping[str, int], *, file_part: str) -> Upload:
    """The form's small fields; `file_part` goes into the spool file. limits: the most bytes of each part, by name."""
    boundary = boundary_of(request.headers.get("content-type", ""))
    with await off_loop(UploadParser, boundary, spool, limits, file_part) as parser:
        async for piece in request.stream():
            await off_loop(parser.feed, piece)
        return await off_loop(parser.finish)


def ensure_tenant(context: ApiContext, tenant: str) -> None:
    """Where nobody needs a key, nobody has to be introduced either."""
    if context.settings.auth != "off":
        return
    try:
        context.store.tenants.get(tenant)
    except NotFound:
        context.store.tenants.create(tenant)
