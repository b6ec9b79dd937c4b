"""What the API allows. Frozen, checked once; knows no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from server.engine.startup.generation_config import SamplingDefaults

MIB = 1024 * 1024
_ORIGIN = re.compile(r"\*|https?://[a-z0-9.\-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")
_MAY_BE_ZERO = ("rank_surcharge", "sse_keep_alive_s")


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Limits and identities of one server.

    auth "off": the tenant is what `X-Tenant-Id` says, else `default_tenant`; admin routes still ask for an admin key.
    data_dir: uploads are spooled in its `uploads` folder. max_sequences bounds prompts x n of one call,
    max_prompt_logprobs the log-probabilities that it reports of its prompts, max_echo_chars the text that it repeats.
    body_timeout_s bounds the reading of a JSON body, upload_timeout_s that of an adapter, idle_timeout_s the wait for
    one more piece of either, write_timeout_s how long a client may leave its stream unread. min_upload_bytes_per_s: on
    average, once an upload has lasted idle_timeout_s. rank_surcharge: how much dearer a token is for each rank of its
    adapter, where tenants share the server.
    sse_keep_alive_s: after so long without an event a stream sends a comment; 0: never. escape_control_tokens: a
    message's text cannot write control tokens. sampling_defaults: what holds where a request leaves it out.
    cors_origins: the pages whose scripts may call the server, as `check_origin` takes them.
    """

    data_dir: Path
    auth: Literal["on", "off"] = "on"
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    default_tenant: str = "default"
    cors_origins: tuple[str, ...] = ()
    max_prompts: int = 64
    max_choices: int = 16
    max_sequences: int = 128
    max_chars_per_token: int = 64
    max_prompt_logprobs: int = 2**20
    max_echo_chars: int = 2**22
    max_body_bytes: int = 8 * MIB
    max_adapter_bytes: int = 1024 * MIB
    max_config_bytes: int = MIB
    max_header_bytes: int = 32 * 1024
    max_header_count: int = 100
    max_target_bytes: int = 8 * 1024
    max_connections: int = 2048
    max_connections_per_address: int = 1024
    max_uploads: int = 16
    max_upload_checks: int = 2
    max_label_values: int = 200
    header_timeout_s: float = 15.0
    body_timeout_s: float = 60.0
    upload_timeout_s: float = 3600.0
    min_upload_bytes_per_s: int = 8192
    idle_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    rank_surcharge: float = 0.0
    sse_keep_alive_s: float = 0.0
    escape_control_tokens: bool = False
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self) -> None:
        if self.auth not in ("on", "off"):
            raise ValueError(f"auth must be 'on' or 'off', got {self.auth!r}")
        for name, value in vars(self).items():
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and value <= 0
                and name not in _MAY_BE_ZERO
            ):
                raise ValueError(f"{name} must be above 0, got {value}")
        for origin in self.cors_origins:
            check_origin(origin)
        for key in self.admin_keys:
            if len(key) < 16:
                raise ValueError(f"an admin key must have at least 16 characters, got {len(key)}")


def check_origin(origin: str) -> None:
    """Raises ValueError unless it is an origin as browsers send it, in lower case and without a path, or "*"."""
    if not _ORIGIN.fullmatch(origin):
        message = f"a CORS origin must be of the form https://app.example.com[:PORT], or *, got {origin[:80]!r}"
        raise ValueError(message)
