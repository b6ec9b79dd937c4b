"""A GPU that fails for good ends `multilora serve`, with every request answered and an exit code of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from support.servers import failing_device
from support.servers.waiting import wait_until

ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "ignore_eos": True}


def test_every_request_is_answered_and_the_process_ends_with_exit_code_7(
    start: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    memory = ("--kv-cache-mib", "16", "--adapter-pool-mib", "16", "--host-cache-mib", "16", "--threads", "1")
    arguments = ("serve", "--base", base, "--json", "--auth", "off", "--data-dir", tmp_path, *memory)
    with start(*arguments, driver=Path(failing_device.__file__)) as server:
        wait_until(server.is_ready)
        answers: list[str] = []

        def ask(stream: bool) -> None:
            body = {**ASK, "stream": stream}
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).text)

        threads = [threading.Thread(target=ask, args=(index == 0,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.ended(timeout_s=120) == 7
    assert len(answers) == 3
    assert all("engine_stopped" in answer for answer in answers)
    error = server.events[-1]["error"]
    assert error["code"] == "device_lost"
    assert failing_device.MESSAGE in error["message"]
    assert any("the device has failed" in line and failing_device.MESSAGE in line for line in server.log)
