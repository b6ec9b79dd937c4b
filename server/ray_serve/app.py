"""`multilora serve` as a Ray Serve application: one replica is one engine with the whole API.

In a Serve config: `import_path: server.ray_serve.app:build`, and under `args` the settings of `multilora serve` by
their names. Variables MULTILORA_NAME count where `args` give no value. Needs `multilora[ray]`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from prometheus_client import start_http_server
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from server.api.telemetry.lora_info import resident_texts
from server.cli.common.admin_key import ENVIRONMENT as ADMIN_KEY
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.logging_setup import set_up_logging
from server.cli.common.output import Output
from server.cli.common.setting_options import drop_service_link
from server.cli.serve.command import settings_from
from server.cli.serve.config_file import checked_values
from server.cli.serve.service import running_service
from server.cli.serve.settings import SERVE_SETTINGS, ServeSettings
from server.ray_serve.edge import OneRequestId
from server.ray_serve.router import RESIDENTS
from server.settings import Setting

_log = logging.getLogger(__name__)

METRICS_HOST, METRICS_PORT = "metrics_host", "metrics_port"
_WORDS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}  # as click reads an option's variable
_ROUTER = {
    "request_router_class": "server.ray_serve.router:AffinityRouter",
    "request_routing_stats_period_s": 1.0,
}


def build(arguments: dict[str, Any]) -> Application:
    """For Ray Serve. Raises CommandError (bad_config, bad_setting, base_not_found) for what `serve` refuses too.

    metrics_port: the first replica of a node answers Prometheus there, the next one at the port after it; metrics_host:
    at which address (127.0.0.1).
    """
    given = dict(arguments)
    host, port = given.pop(METRICS_HOST, "127.0.0.1"), given.pop(METRICS_PORT, None)
    if port is not None and not (type(port) is int and 0 < port < 65_536):
        message = f"args: {METRICS_PORT} must be a whole number from 1 to 65535, got {port!r:.80}"
        raise CommandError("bad_config", message, ExitCode.REFUSED)
    settings_of_replica(given)  # refused here, where the operator sees it
    return Replica.bind(given, None if port is None else (host, port))  # type: ignore[attr-defined]


@serve.deployment(
    name="multilora",
    request_router_config=_ROUTER,
    max_ongoing_requests=512,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress()
class Replica:
    """One engine. Ray waits for its requests, for at most graceful_shutdown_timeout_s, before it is deleted."""

    def __init__(self, arguments: dict[str, Any], metrics: tuple[str, int] | None = None) -> None:
        if not os.environ.get(ADMIN_KEY):
            raise CommandError("bad_setting", f"{ADMIN_KEY} is not set: all replicas have the same admin key")
        settings = settings_of_replica(arguments)
        set_up_logging(log_format=settings.log_format)
        self._parts = ExitStack()
        self._service = self._parts.enter_context(running_service(settings, Output()))
        if metrics is not None:
            self._show_metrics(metrics[0], metrics[1] + serve.get_replica_context().rank.local_rank)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return OneRequestId(self._service.app)

    async def check_health(self) -> None:
        """Raises RuntimeError; Ray then starts another replica."""
        if not self._service.parts.worker.is_healthy():
            raise RuntimeError("the engine stopped")

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router reads: the texts that reach an adapter on this device."""
        worker = self._service.parts.worker
        return {RESIDENTS: resident_texts(worker.stats(), self._service.store.served_names, worker.served_name)}

    async def __del__(self) -> None:
        if not hasattr(self, "_service"):
            return  # the constructor failed
        draining = self._service.app.state.context.draining
        draining.begin()
        draining.cut_off()
        self._parts.close()

    def _show_metrics(self, host: str, port: int) -> None:
        """Through Ray's proxy a scrape reaches any replica, and counters would go up and down."""
        try:
            server, _ = start_http_server(port, host, registry=self._service.app.state.context.metrics.registry)
        except OSError as error:
            _log.warning("no metrics at port %d: %s", port, error)
            return
        self._parts.callback(server.shutdown)


def settings_of_replica(arguments: Mapping[str, Any]) -> ServeSettings:
    """The settings of `multilora serve`, from arguments and variables. Raises as `build`."""
    drop_service_link()
    variables = {
        name: _value(setting, os.environ[variable])
        for name, setting in SERVE_SETTINGS.items()
        for variable in reversed(setting.environment)
        if os.environ.get(variable)
    }
    given = checked_values("args", {**variables, **arguments}, SERVE_SETTINGS)
    return settings_from({**{name: each.default for name, each in SERVE_SETTINGS.items()}, **given})


def _value(setting: Setting, text: str) -> Any:
    """A variable's value, read as the commands read it."""
    if setting.is_list:
        return text.split()
    if setting.kind not in (int, float, bool):
        return text
    try:
        return _WORDS[text.strip().lower()] if setting.kind is bool else setting.kind(text)
    except (KeyError, ValueError):
        message = f"{setting.environment[0]} must be of type {setting.type_name}, got {text!r:.80}"
        raise CommandError("bad_config", message, ExitCode.REFUSED) from None
