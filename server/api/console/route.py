"""GET /console: a page that uses the public API with the key that its user types in. Open to all: it holds no data.

The browser holds the page to `SECURITY`: scripts and styles of this server alone, calls to this server alone, no frame
around it, and no text ever parsed as HTML (trusted types).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.settings import ApiSettings

PATH = "/console"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
SECURITY = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # after an upgrade all files are of one version
}


def console_router(settings: ApiSettings) -> APIRouter:
    """The page and its files, read now; no route if the console is off."""
    router = APIRouter(include_in_schema=False)
    if settings.console == "off":
        return router
    answers = {name: _answer(name, text) for name, text in page_files(settings).items()}

    @router.get(PATH)
    async def show_console() -> Response:
        return answers[PAGE]

    @router.get(f"{PATH}/{{name}}")
    async def show_file(name: str) -> Response:
        if name not in answers:
            raise HTTPException(404)
        return answers[name]

    return router


def page_files(settings: ApiSettings) -> Mapping[str, bytes]:
    """By name. The page says whether tenants have keys: without them it asks for a tenant's name."""
    folder = files(__package__) / "page"
    found = {file.name: file.read_bytes() for file in folder.iterdir() if _type_of(file.name) is not None}
    found[PAGE] = found[PAGE].replace(b'data-auth="on"', f'data-auth="{settings.auth}"'.encode())
    return found


def _type_of(name: str) -> str | None:
    return MEDIA_TYPES.get(f".{name.rpartition('.')[2]}")


def _answer(name: str, text: bytes) -> Response:
    return Response(text, media_type=_type_of(name), headers=SECURITY)
