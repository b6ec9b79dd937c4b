"""A replica without Ray: the arguments of a Serve config start the same service as the options of `multilora serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli.common.failures import CommandError
from server.cli.common.output import Output
from server.cli.serve.service import running_service
from server.ray_serve.app import build, settings_of_replica
from support.servers.service import make_base

SMALL = {"threads": 1, "jobs": "off", "kv_cache_mib": 8, "adapter_pool_mib": 8, "host_cache_mib": 8}


def test_the_arguments_of_a_config_start_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config has texts and numbers alone; so have variables."""
    monkeypatch.setenv("MULTILORA_IMPORT_PREFIX", "/srv/a /srv/b")
    base = make_base(tmp_path / "tiny")
    settings = settings_of_replica({**SMALL, "base": str(base), "data_dir": str(tmp_path / "data"), "drain_s": 3})
    assert settings.data_dir == tmp_path / "data"
    with running_service(settings, Output()) as service:
        assert service.parts.worker.is_healthy()
        assert service.app.state.context.settings.import_prefixes == ("/srv/a", "/srv/b")


def test_variables_mean_what_they_mean_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets MULTILORA_PORT to a URL beside a service called multilora; 1 is true, and 1e1 a number."""
    given = {**SMALL, "base": str(make_base(tmp_path / "tiny"))}
    texts = {"PORT": "tcp://10.0.0.1:8000", "PREFIX_CACHE": "1", "CUDA_GRAPHS": "off", "DRAIN_S": "1e1"}
    for name, text in texts.items():
        monkeypatch.setenv(f"MULTILORA_{name}", text)
    settings = settings_of_replica(given)
    assert (settings.port, settings.drain_s) == (8000, 10.0)
    assert (settings.engine.prefix_cache, settings.engine.cuda_graphs) == (True, False)
    monkeypatch.setenv("MULTILORA_DRAIN_S", "[")
    with pytest.raises(CommandError, match=r"MULTILORA_DRAIN_S must be of type number, got '\['"):
        settings_of_replica(given)


@pytest.mark.parametrize("port", ["9100", 0, 70_000, True])
def test_a_port_of_the_metrics_that_is_none_is_refused_before_a_replica_starts(port: object) -> None:
    with pytest.raises(CommandError, match="metrics_port must be a whole number from 1 to 65535, got"):
        build({"metrics_port": port})
