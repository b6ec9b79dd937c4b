"""One real Ray node for every test of this folder that needs one: it takes minutes to start on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.servers.ray_cluster import RayCluster, ray_cluster

ADMIN_KEY = "a-key-of-an-operator-0123456789"


@pytest.fixture(scope="package")
def cluster() -> Iterator[RayCluster]:
    variables = {
        "RAY_SERVE_SESSION_ID_HEADER_KEY": "authorization",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.ray_serve.edge.in_the_proxy",
        "MULTILORA_ADMIN_KEY": ADMIN_KEY,
        "OMP_NUM_THREADS": "1",
    }
    with ray_cluster(**variables) as cluster:
        yield cluster
