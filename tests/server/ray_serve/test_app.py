"""A replica without Ray: the arguments of a Serve config start the same service as the options of `multilora serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli.common.output import Output
from server.cli.serve.service import running_service
from server.ray_serve.app import settings_of_replica
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
