"""What is logged, and the format of a line: text, or JSON for collectors. Logs go to stderr, answers to stdout."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from server.api.edge.request_context import RequestIdFilter

OURS = ("server", "adapters_store", "lora_kernels")


class JsonFormatter(logging.Formatter):
    """One object per record; an exception is one field. The parts of a request's line are fields too."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", "-"),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(*, log_format: str = "text", ours: int = logging.INFO) -> None:
    """Log this product from level `ours`, other libraries from WARNING, transformers from ERROR.

    log_format: "text" or "json".
    """
    from transformers.utils import logging as transformers_logging  # late: --help imports nothing heavy

    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s [%(request_id)s]: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if log_format == "json" else plain)
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(ours)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # logs a missing CPU kernel at every import
    # Its own handler writes lines that a collector of JSON cannot read. What it warns of is refused here, or harmless.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.set_verbosity_error()
