"""`multilora serve`: reads the options, takes the port, and hands over to `serving`, which knows the engine."""

from __future__ import annotations

import typer

from adapters_store.storage.reach import DEFAULT_GRACE_S
from server.cli.common.base_path import find_base
from server.cli.common.database_url import DatabaseUrlOption
from server.cli.common.job_options import JobsMaxRunningOption, JobsMemoryOption, job_limits
from server.cli.common.logging_setup import LogFormat, set_up_logging
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, HostOption, JsonOption, PortOption
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals
from server.cli.serve.listening import DRAIN_S, bound
from server.cli.serve.options import (
    MAX_BATCH_TOKENS,
    AdapterPoolOption,
    Auth,
    AuthOption,
    CorsOriginOption,
    DatabaseGraceOption,
    Device,
    DeviceOption,
    DrainOption,
    Dtype,
    DtypeOption,
    EscapeControlTokensOption,
    GenerationConfigOption,
    HostCacheOption,
    KvCacheOption,
    LogFormatOption,
    MaxAdaptersOption,
    MaxBatchTokensOption,
    MaxConnectionsOption,
    MaxConnectionsPerAddressOption,
    MaxModelLenOption,
    MaxRunningOption,
    NoCudaGraphsOption,
    NoPrefixCacheOption,
    OtlpEndpointOption,
    QuantizeOption,
    RequiredBaseOption,
    ServedNameOption,
    ServeOptions,
    SseKeepAliveOption,
    ThreadsOption,
)


def serve(
    *,
    base: RequiredBaseOption,
    served_name: ServedNameOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    quantize: QuantizeOption = None,
    device: DeviceOption = Device.AUTO,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url: DatabaseUrlOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    auth: AuthOption = Auth.ON,
    max_model_len: MaxModelLenOption = None,
    max_running: MaxRunningOption = 64,
    max_batch_tokens: MaxBatchTokensOption = MAX_BATCH_TOKENS,
    max_adapters: MaxAdaptersOption = 512,
    threads: ThreadsOption = None,
    kv_cache_mib: KvCacheOption = None,
    adapter_pool_mib: AdapterPoolOption = None,
    host_cache_mib: HostCacheOption = None,
    no_prefix_cache: NoPrefixCacheOption = False,
    no_cuda_graphs: NoCudaGraphsOption = False,
    drain_s: DrainOption = DRAIN_S,
    cors_origin: CorsOriginOption = None,
    database_grace_s: DatabaseGraceOption = DEFAULT_GRACE_S,
    max_connections: MaxConnectionsOption = 2048,
    max_connections_per_address: MaxConnectionsPerAddressOption = 1024,
    sse_keep_alive_s: SseKeepAliveOption = 0.0,
    generation_config: GenerationConfigOption = "neutral",
    escape_control_tokens: EscapeControlTokensOption = False,
    jobs_max_running: JobsMaxRunningOption = 1,
    jobs_memory_mib: JobsMemoryOption = None,
    log_format: LogFormatOption = LogFormat.TEXT,
    otlp_endpoint: OtlpEndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a base and every tenant's adapters for it over HTTP, until SIGINT or SIGTERM.

    Prints "ready on URL" once requests are served; /ready answers 200 from then on. With --json the lines are events:
    stage, memory, admin_key, ready, stopping, stopped. The admin key is made on the first start; MULTILORA_ADMIN_KEY
    takes its place.
    """
    if max_batch_tokens < max_running:
        message = f"must be at least --max-running ({max_running}), got {max_batch_tokens}"
        raise typer.BadParameter(message, param_hint="--max-batch-tokens")
    output = Output(as_json=as_json, with_events=True)
    set_up_logging(log_format=log_format)
    folder, own_name = find_base(base)
    options = ServeOptions(
        base=folder,
        served_name=served_name or own_name,
        data_dir=data_dir,
        dtype=dtype,
        quantize=quantize,
        device=device,
        auth=auth,
        max_model_len=max_model_len,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        kv_cache_mib=kv_cache_mib,
        adapter_pool_mib=adapter_pool_mib,
        host_cache_mib=host_cache_mib,
        max_adapters=max_adapters,
        threads=threads,
        prefix_cache=not no_prefix_cache,
        cuda_graphs=not no_cuda_graphs,
        otlp_endpoint=otlp_endpoint,
        drain_s=drain_s,
        cors_origins=tuple(cors_origin or ()),
        database_grace_s=database_grace_s,
        max_connections=max_connections,
        max_connections_per_address=max_connections_per_address,
        sse_keep_alive_s=sse_keep_alive_s,
        generation_config=generation_config,
        escape_control_tokens=escape_control_tokens,
        database_url=database_url,
        jobs=job_limits(jobs_max_running, jobs_memory_mib),
    )
    with StopSignals() as signals, bound(host, port) as listener:
        with output.stage("importing torch and transformers"):
            from server.cli.serve import run as serving
        serving.run(options, listener, output, signals)
    output.event("stopped")
    output.say("stopped")
