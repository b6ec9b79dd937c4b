"""What `multilora serve` may be told. Decides names, bounds and help; knows nothing of what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from server.api.settings import check_origin
from server.cli.common.logging_setup import LogFormat
from server.jobs.limits import JobLimits


class Dtype(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Quantize(StrEnum):
    NF4 = "nf4"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Auth(StrEnum):
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """One start of the server. *_mib: MiB. None: from the base or from the machine."""

    base: Path
    served_name: str
    data_dir: Path
    dtype: str
    quantize: str | None
    device: str
    auth: Auth
    max_model_len: int | None
    max_running: int
    max_batch_tokens: int
    kv_cache_mib: int | None
    adapter_pool_mib: int | None
    host_cache_mib: int | None
    max_adapters: int
    threads: int | None
    prefix_cache: bool
    cuda_graphs: bool
    otlp_endpoint: str | None = None
    drain_s: float
    database_grace_s: float
    max_connections: int
    max_connections_per_address: int
    cors_origins: tuple[str, ...] = ()
    sse_keep_alive_s: float = 0.0
    generation_config: str = "neutral"
    escape_control_tokens: bool = False
    database_url: str | None = field(default=None, repr=False)
    jobs: JobLimits


_MEMORY, _LIMITS, _MODEL = "Memory", "Limits", "Model"

RequiredBaseOption = Annotated[
    str,
    typer.Option(
        "--base",
        help="The base: a folder, or a hub id with a local copy.",
        metavar="PATH_OR_ID",
        rich_help_panel=_MODEL,
    ),
]
ServedNameOption = Annotated[
    str | None,
    typer.Option(help="The base's id in the API (default: the last part of --base).", rich_help_panel=_MODEL),
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: the base's own.", rich_help_panel=_MODEL)]
QuantizeOption = Annotated[
    Quantize | None, typer.Option(help="nf4: 4-bit base weights (bitsandbytes).", rich_help_panel=_MODEL)
]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU where there is one.", rich_help_panel=_MODEL)]
AuthOption = Annotated[Auth, typer.Option(help="off: no keys; X-Tenant-Id names the tenant.")]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer (default: the base's).", min=2, rich_help_panel=_LIMITS),
]
MaxRunningOption = Annotated[int, typer.Option(help="Requests in one batch.", min=1, rich_help_panel=_LIMITS)]
MAX_BATCH_TOKENS = 512  # of a step, where nobody says otherwise
MaxBatchTokensOption = Annotated[
    int,
    typer.Option(
        help="Tokens in one forward, at least --max-running. Longer prompts run in pieces; raise it on a GPU.",
        min=1,
        rich_help_panel=_LIMITS,
    ),
]
MaxAdaptersOption = Annotated[int, typer.Option(help="Adapters on the device at once.", min=1, rich_help_panel=_LIMITS)]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads of the engine (default: physical cores).", min=1, rich_help_panel=_LIMITS),
]
KvCacheOption = Annotated[
    int | None, typer.Option(help="Keys and values of running requests.", min=1, rich_help_panel=_MEMORY)
]
AdapterPoolOption = Annotated[int | None, typer.Option(help="Adapters on the device.", min=1, rich_help_panel=_MEMORY)]
HostCacheOption = Annotated[int | None, typer.Option(help="Adapters in host memory.", min=1, rich_help_panel=_MEMORY)]
NoCudaGraphsOption = Annotated[
    bool,
    typer.Option("--no-cuda-graphs", help="Launch every decode step's kernels one by one.", rich_help_panel=_MODEL),
]
NoPrefixCacheOption = Annotated[
    bool, typer.Option("--no-prefix-cache", help="Compute every prompt in full.", rich_help_panel=_MEMORY)
]
LogFormatOption = Annotated[LogFormat, typer.Option(help="Of the log on stderr.")]
OtlpEndpointOption = Annotated[
    str | None,
    typer.Option(help="Send traces to this OTLP/HTTP collector.", metavar="URL", envvar="OTEL_EXPORTER_OTLP_ENDPOINT"),
]
DrainOption = Annotated[
    float,
    typer.Option(
        help="Seconds that answers under way may take to end after SIGTERM.",
        min=0.0,
        max=3600.0,
        rich_help_panel=_LIMITS,
    ),
]


def _origins(values: list[str] | None) -> list[str] | None:
    for value in values or []:
        try:
            check_origin(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return values


CorsOriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        help="Let scripts of this page call the server; may be given more than once. *: of every page.",
        metavar="ORIGIN",
        callback=_origins,
    ),
]
DatabaseGraceOption = Annotated[
    float,
    typer.Option(
        help="Seconds that known keys and adapters are served while the database does not answer; 503 after that.",
        min=0.0,
        max=86_400.0,
        rich_help_panel=_LIMITS,
    ),
]
MaxConnectionsOption = Annotated[int, typer.Option(help="Connections at once.", min=1, rich_help_panel=_LIMITS)]
MaxConnectionsPerAddressOption = Annotated[
    int,
    typer.Option(help="Of them, from one address; raise it behind a gateway.", min=1, rich_help_panel=_LIMITS),
]
SseKeepAliveOption = Annotated[
    float,
    typer.Option(
        "--sse-keep-alive-s",
        help="A silent stream sends a comment after so many seconds, also while queued (0: never).",
        min=0.0,
        max=3600.0,
        rich_help_panel=_LIMITS,
    ),
]
GenerationConfigOption = Annotated[
    str,
    typer.Option(
        help="Sampling defaults: auto (the base's generation_config.json), a folder with one, or neutral.",
        metavar="auto|neutral|DIR",
        rich_help_panel=_MODEL,
    ),
]
EscapeControlTokensOption = Annotated[
    bool,
    typer.Option(
        "--escape-control-tokens",
        help="Names of control tokens in chat messages are text, not tokens.",
        rich_help_panel=_MODEL,
    ),
]
