"""The real API over the real engine on a free port of 127.0.0.1, as a process of its own, for server_load.py
and fairness.py.

Prints one line with its URL once it listens, and ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path

from adapters_store.store import AdapterStore
from benchmarks.common.shapes import shape_for
from benchmarks.common.workload import bench_engine
from server.api.app import create_app
from server.api.edge.connections.server import ListenSettings, build_server
from server.api.settings import ApiSettings
from server.engine.schedule import CPU_STEP

MAX_ROWS = 64
WIDE_STEP_TOKENS = 2048  # a step that holds the longest prompts in one piece


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.server_process", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--pool-adapters", type=int, default=32)
    parser.add_argument("--host-adapters", type=int, default=256)
    parser.add_argument("--as-served", action="store_true", help="steps and prefix cache as `multilora serve` has them")
    options = parser.parse_args(arguments)
    store = AdapterStore.open(options.data_dir)
    engine = bench_engine(
        shape_for(quick=options.quick),
        store,
        pool_adapters=options.pool_adapters,
        host_adapters=options.host_adapters,
        max_rows=MAX_ROWS,
        max_batch_tokens=CPU_STEP.tokens if options.as_served else WIDE_STEP_TOKENS,
        prefix_cache=options.as_served,
    )
    with engine as parts, socket.socket() as listener:
        parts.worker.start()
        app = create_app(engine=parts.worker, store=store, settings=ApiSettings(data_dir=options.data_dir, auth="off"))
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # connections wait from here on, also before the server takes them
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        build_server(app, app.state.context.settings, ListenSettings(grace_s=2)).run(sockets=[listener])
    store.close()


if __name__ == "__main__":
    main()
