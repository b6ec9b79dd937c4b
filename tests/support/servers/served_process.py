"""A server over the fake engine, to be killed: `python served_process.py DATA_DIR FLUSH_S` prints its URL."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.api.telemetry.usage_log import UsageLog
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import tiny_base
from support.models.tokenizer_zoo import byte_level, wrapped
from support.servers.live_server import serving
from support.worlds.fake_engine import FakeEngine


def main(data_dir: Path, flush_every_s: float) -> None:
    store = AdapterStore.open(data_dir)
    with FakeEngine(tiny_base(), Tokenizer(wrapped(byte_level())), step_s=0.002) as engine:
        usage = UsageLog(store.usage, flush_every_s=flush_every_s)
        settings = ApiSettings(data_dir=data_dir, auth="off")
        app = create_app(engine=engine, store=store, settings=settings, usage=usage)
        with background(app), serving(app) as url:
            print(url, flush=True)
            time.sleep(3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
