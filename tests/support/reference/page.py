"""docs/reference.md as a whole. `python -m support.reference.page` in `tests/` writes it (`make reference`).

It writes the tables of docs/adapters.md, too.
"""

from __future__ import annotations

from pathlib import Path

from server.cli.common.failures import EPILOG
from support.reference import commands, environment, error_codes, metrics, served_adapters, settings

PAGE = Path(__file__).parents[3] / "docs" / "reference.md"

HEAD = f"""# Reference

Written by `make reference` from the code; a test compares the two. Do not edit it by hand.
What the words mean: [glossary.md](glossary.md). What to do about an error: [troubleshooting.md](troubleshooting.md).

Contents: [commands](#commands), [settings of serve](#settings-of-serve), [environment](#environment),
[metrics](#metrics), [error codes](#error-codes).

## Commands
{EPILOG}
"""
SETTINGS = """## Settings of serve
Give a setting by its option, by its variable, or in the YAML file of `--config FILE` by its name: the option without
leading dashes. An option goes before a variable, a variable before the file. `multilora serve --print-config` shows the
result.
"""
ENVIRONMENT = """## Environment
Variables of options and settings are in the tables above. These are read beside them.

"""
METRICS = """## Metrics
`GET /metrics` of a server with a real engine. How to use them: [observability.md](observability.md).

"""
CODES = """## Error codes
`error.code` of an answer, and of a command with `--json`. Columns: the HTTP status of the answer; the exit code of the
command; where else the code is seen. There "job" is a job's `error.code`, "training" a problem of a training file or
the `result.json` of a run, "gate" a reason of the gate. In messages `...` stands for names and values.

"""


def page() -> str:
    parts = [HEAD, *commands.sections(), SETTINGS, *settings.sections(), ENVIRONMENT + environment.section()]
    return "\n".join([*parts, METRICS + metrics.section(), CODES + error_codes.section()])


if __name__ == "__main__":
    PAGE.write_text(page())
    served_adapters.PAGE.write_text(served_adapters.page(served_adapters.PAGE.read_text()))
