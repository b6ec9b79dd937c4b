"""Settings of the API. Frozen, checked once; knows no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from adapters_store.remote.imports import check_prefix
from server.engine.startup.generation_config import SamplingDefaults
from server.settings import check_settings, setting

MIB = 1024 * 1024
_ORIGIN = re.compile(r"\*|https?://[a-z0-9.\-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")
_ACCESS, _REQUESTS, _HTTP, _UPLOADS = "Access", "Requests", "HTTP", "Uploads"


def check_origin(origin: str) -> None:
    """Raises ValueError unless it is an origin as browsers send it, in lower case and without a path, or "*"."""
    if not _ORIGIN.fullmatch(origin):
        message = f"a CORS origin must be of the form https://app.example.com[:PORT], or *, got {origin[:80]!r}"
        raise ValueError(message)


def check_keep_alive(seconds: float) -> None:
    """Raises ValueError for a pause so short that comments would flood the client."""
    if seconds != 0 and not seconds >= 1:
        raise ValueError(f"sse_keep_alive_s must be 0 (never) or at least 1, got {seconds:g}")


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Limits and identities of one server. data_dir: uploads are spooled in its `uploads` folder.

    sampling_defaults: what applies if a request leaves it out. The rest is said by each field's help.
    """

    data_dir: Path
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    auth: Literal["on", "off"] = setting(
        "on",
        "off: no keys for tenants; X-Tenant-Id names the tenant. Admin routes still need an admin key.",
        choices=("on", "off"),
        group=_ACCESS,
    )
    default_tenant: str = setting(
        "default", "Tenant of a request without X-Tenant-Id, with --auth off.", metavar="NAME", group=_ACCESS
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "Let scripts of pages of this origin call the server; may be given more than once. *: every page.",
        name="cors_origin",
        metavar="ORIGIN",
        check=check_origin,
        group=_ACCESS,
    )

    console: Literal["on", "off"] = setting(
        "on", "Serve the console, a page for browsers, at /console.", choices=("on", "off"), group=_ACCESS
    )

    import_prefixes: tuple[str, ...] = setting(
        (),
        "Let operators import adapters from under this s3://, gs:// or az:// prefix or folder; repeatable.",
        name="import_prefix",
        metavar="PREFIX",
        check=check_prefix,
        group=_ACCESS,
    )

    max_prompts: int = setting(
        64, "Maximum prompts of one completion call, and inputs of one embeddings call.", at_least=1, group=_REQUESTS
    )
    max_choices: int = setting(16, "Maximum n of one call.", at_least=1, group=_REQUESTS)
    max_sequences: int = setting(128, "Maximum prompts x n of one call.", at_least=1, group=_REQUESTS)
    max_chars_per_token: int = setting(
        64, "A prompt of more characters than this times the context is refused unread.", at_least=1, group=_REQUESTS
    )
    max_prompt_logprobs: int = setting(
        2**20, "Maximum log-probabilities of prompt tokens in one answer.", at_least=1, group=_REQUESTS
    )
    max_echo_chars: int = setting(
        2**22, "Maximum characters of prompts that one answer repeats (echo).", at_least=1, group=_REQUESTS
    )
    escape_control_tokens: bool = setting(
        False, "Names of control tokens in chat messages are text, not tokens.", group=_REQUESTS
    )
    rank_surcharge: float = setting(
        0.0,
        "How much more a token counts in fair sharing per rank of its adapter.",
        at_least=0,
        at_most=1000,
        group=_REQUESTS,
    )
    sse_keep_alive_s: float = setting(
        0.0,
        "A stream that is silent this long sends a comment, also while it is queued. 0: never, else at least 1.",
        check=check_keep_alive,
        at_most=3600,
        group=_REQUESTS,
    )

    max_body_bytes: int = setting(8 * MIB, "Maximum size of a JSON body.", at_least=1, group=_HTTP)
    max_header_bytes: int = setting(32 * 1024, "Maximum size of all headers of a request.", at_least=1, group=_HTTP)
    max_header_count: int = setting(100, "Maximum headers of a request.", at_least=1, group=_HTTP)
    max_target_bytes: int = setting(8 * 1024, "Maximum size of path and query.", at_least=1, group=_HTTP)
    max_connections: int = setting(2048, "Maximum open connections.", at_least=1, group=_HTTP)
    max_connections_per_address: int = setting(
        1024, "Maximum open connections from one address. Raise it behind a gateway.", at_least=1, group=_HTTP
    )
    backlog: int = setting(
        2048, "Connections that the system queues before they are accepted.", at_least=1, group=_HTTP
    )
    keep_alive_s: int = setting(
        30, "An idle connection is closed after this time.", at_least=1, at_most=86_400, group=_HTTP
    )
    header_timeout_s: float = setting(
        15.0, "Maximum time to receive a request's headers.", above=0, at_most=86_400, group=_HTTP
    )
    body_timeout_s: float = setting(60.0, "Maximum time to receive a JSON body.", above=0, at_most=86_400, group=_HTTP)
    idle_timeout_s: float = setting(30.0, "Maximum wait for more of a body.", above=0, at_most=86_400, group=_HTTP)
    write_timeout_s: float = setting(
        60.0, "A stream ends if its client reads nothing for this time.", above=0, at_most=86_400, group=_HTTP
    )
    max_label_values: int = setting(
        200, "Maximum tenants, and maximum adapters, with metrics of their own.", at_least=1, group=_HTTP
    )
    metrics_max_age_s: float = setting(
        0.05, "Readers of /metrics within this time share one text.", at_least=0, at_most=60, group=_HTTP
    )

    max_adapter_bytes: int = setting(1024 * MIB, "Maximum size of an uploaded adapter.", at_least=1, group=_UPLOADS)
    max_config_bytes: int = setting(MIB, "Maximum size of its adapter_config.json.", at_least=1, group=_UPLOADS)
    max_uploads: int = setting(16, "Maximum uploads at once.", at_least=1, group=_UPLOADS)
    max_upload_checks: int = setting(2, "Maximum uploads that are checked at once.", at_least=1, group=_UPLOADS)
    upload_timeout_s: float = setting(3600.0, "Maximum time of an upload.", above=0, at_most=86_400, group=_UPLOADS)
    min_upload_bytes_per_s: int = setting(
        8192,
        "Minimum average speed of an upload, once it has lasted --idle-timeout-s.",
        at_least=1,
        unit="bytes per second",
        group=_UPLOADS,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for key in self.admin_keys:
            if len(key) < 16:
                raise ValueError(f"an admin key must have at least 16 characters, got {len(key)}")
