"""What is logged and how a line looks: plain, or JSON for collectors. Always on stderr; answers are on stdout."""

from __future__ import annotations

import json
import logging
import sys
import time

OURS = ("server", "adapters_store", "lora_kernels")


class JsonFormatter(logging.Formatter):
    """One object per record; an exception is one field."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(*, as_json: bool = False, ours: int = logging.INFO) -> None:
    """Our own loggers from level `ours`, everybody else's from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if as_json else plain)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(ours)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # misses a CPU kernel of the hub's at every import
