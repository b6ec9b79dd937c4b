"""What a tenant's owner does while it is served: uploads, canaries, rollbacks, deletions, keys, quotas. Knows HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from benchmarks.serving.demo_server import ADMIN_KEY, auth
from benchmarks.soaking.tenant import CHANGING, Tenant

ADMIN = auth(ADMIN_KEY)
OVERLAP_S = 600


@dataclass(frozen=True, slots=True)
class Content:
    """One adapter's two files."""

    config: bytes
    weights: bytes

    @classmethod
    def read(cls, folder: Path) -> Content:
        return cls((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())


async def push(
    client: httpx.AsyncClient, headers: dict[str, str], name: str, content: Content, *, activate: bool = True
) -> httpx.Response:
    files = {"config": content.config, "weights": content.weights}
    params = {"activate": activate}
    return await client.post("/v1/adapters", params=params, data={"name": name}, files=files, headers=headers)


class Owner:
    """Changes one thing after the other of a tenant, each after a pause."""

    def __init__(self, tenant: Tenant, client: httpx.AsyncClient, contents: Sequence[Content], seed: int) -> None:
        self._tenant, self._client, self._contents = tenant, client, contents
        self._dice = random.Random(seed)
        self.num_made = 0
        self.num_refused = 0
        self._changes: tuple[Callable[[], Awaitable[httpx.Response]], ...] = (
            *[self._upload] * 3,
            *[self._canary] * 3,
            *[self._verb] * 4,
            *[self._delete] * 2,
            self._come_and_go,
            self._rotate_key,
            self._set_quotas,
            self._look,
        )

    async def change_until(self, end_s: float, every_s: float) -> None:
        """Makes a change about every `every_s`."""
        while (pause_s := self._dice.expovariate(1 / every_s)) < end_s - time.perf_counter():
            await asyncio.sleep(pause_s)
            try:
                answer = await self._dice.choice(self._changes)()
            except httpx.HTTPError as error:
                self._tenant.seen.fault(f"{self._tenant.name}'s owner: {type(error).__name__}: {error}")
                continue
            self.num_made += answer.status_code < 300
            self.num_refused += 400 <= answer.status_code < 500
            if answer.status_code not in (200, 201, 204, 404, 409):
                asked = f"{answer.request.method} {answer.request.url.path}"
                self._tenant.seen.fault(f"{self._tenant.name}'s owner: {answer.status_code} for {asked}: {answer.text}")

    async def _post(self, path: str, body: object = None) -> httpx.Response:
        return await self._client.post(path, json=body, headers=self._tenant.headers)

    async def _some_version(self) -> str:
        """changing@N of those there are."""
        answer = await self._client.get(f"/v1/adapters/{CHANGING}", headers=self._tenant.headers)
        versions = answer.json().get("versions", []) if answer.status_code == 200 else []
        return f"{CHANGING}@{self._dice.choice(versions)['version'] if versions else 1}"

    async def _upload(self) -> httpx.Response:
        content, activate = self._dice.choice(self._contents), self._dice.random() < 0.3
        return await push(self._client, self._tenant.headers, CHANGING, content, activate=activate)

    async def _canary(self) -> httpx.Response:
        path = f"/v1/adapters/{await self._some_version()}/canary"
        return await self._post(path, {"percent": self._dice.randrange(0, 60)})

    async def _verb(self) -> httpx.Response:
        verb = self._dice.choice(["promote", "rollback", "unload", "activate"])
        named = CHANGING if verb in ("promote", "rollback") else await self._some_version()
        return await self._post(f"/v1/adapters/{named}/{verb}")

    async def _delete(self) -> httpx.Response:
        return await self._client.delete(f"/v1/adapters/{await self._some_version()}", headers=self._tenant.headers)

    async def _come_and_go(self) -> httpx.Response:
        """A new name, used once and deleted."""
        name, headers = f"once-{self._dice.randrange(10**9)}", self._tenant.headers
        await push(self._client, headers, name, self._dice.choice(self._contents))
        body = {"model": name, "prompt": "Tell me", "max_tokens": 4}
        await self._client.post("/v1/completions", json=body, headers=headers)
        return await self._client.delete(f"/v1/adapters/{name}", headers=headers)

    async def _rotate_key(self) -> httpx.Response:
        path, params = f"/admin/tenants/{self._tenant.name}/rotate-key", {"overlap_s": OVERLAP_S}
        answer = await self._client.post(path, params=params, headers=ADMIN)
        if answer.status_code in (200, 201):
            self._tenant.key = answer.json()["api_key"]
        return answer

    async def _set_quotas(self) -> httpx.Response:
        """Quotas wide enough to refuse no request."""
        body = {"weight": 1, "requests_per_minute": self._dice.randrange(100_000, 200_000)}
        return await self._client.put(f"/admin/tenants/{self._tenant.name}/quotas", json=body, headers=ADMIN)

    async def _look(self) -> httpx.Response:
        path = self._dice.choice(["/v1/usage", "/v1/models", "/v1/adapters"])
        return await self._client.get(path, headers=self._tenant.headers)
