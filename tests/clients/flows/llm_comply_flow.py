"""llm-comply's own checks of three formats: chats, responses and messages, its tool calls among them.

Left out: images, which are refused by name; reasoning, which it asks of other models' names alone; and compaction, a
route that is not served.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHAT = ("basic-response", "system-prompt", "multi-turn", "streaming-response", "streaming-usage", "error-handling")
RESPONSES = (*CHAT, "assistant-phase", "response-output-phase-schema")
TOOLS = "tool-calling"  # asked of an adapter that learned tool calls
FORMATS = {"openai-chat": ("chat-", CHAT), "open-responses": ("", RESPONSES), "anthropic": ("anth-", CHAT)}


def passed(api: str, prefix: str, checks: tuple[str, ...], key: str, model: str) -> int:
    """How many checks passed, which is all of them."""
    command = [str(Path(sys.executable).with_name("llm-comply")), "--format", api, "--timeout", "60"]
    command += ["-u", os.environ["CLIENT_URL"], "-k", key, "-m", model]
    command += ["-f", ",".join(f"{prefix}{check}" for check in checks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(checks)}/{len(checks)} passed" in done.stdout, done.stdout
    assert "warning" not in done.stdout.lower(), done.stdout
    return len(checks)


own, agent = os.environ["CLIENT_KEY"], json.loads(os.environ["CLIENT_AGENT_KEYS"])["desk"]
total = 0
for api, (prefix, checks) in FORMATS.items():
    total += passed(api, prefix, checks, own, os.environ["CLIENT_MODEL"])
    total += passed(api, prefix, (TOOLS,), agent, "agent")
print(f"{total} checks of {', '.join(FORMATS)}")
