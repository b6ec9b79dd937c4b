"""llm-comply's own checks of the chat format, without those of tools and reasoning, which need a tenant that learned
them, and of images, which are refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKS = ("basic-response", "system-prompt", "multi-turn", "streaming-response", "streaming-usage", "error-handling")

command = [str(Path(sys.executable).with_name("llm-comply")), "--format", "openai-chat", "--timeout", "60"]
command += ["-u", os.environ["CLIENT_URL"], "-k", os.environ["CLIENT_KEY"], "-m", os.environ["CLIENT_MODEL"]]
command += ["-f", ",".join(f"chat-{check}" for check in CHECKS)]
done = subprocess.run(command, capture_output=True, text=True, check=False)
assert done.returncode == 0, done.stdout + done.stderr
assert f"{len(CHECKS)}/{len(CHECKS)} passed" in done.stdout, done.stdout
assert "warning" not in done.stdout.lower(), done.stdout
print(f"{len(CHECKS)} checks: {', '.join(CHECKS)}")
