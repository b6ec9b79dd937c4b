"""Decides which KV block holds which tokens of which tenant. Knows hashes and block ids; knows no reference counts.

A full block is named by a chain: sha256(parent's name, token ids), where the first block's parent is
sha256(tenant salt, adapter digest, base digest, rope set). So two requests can only ever meet in a block when all of
these are equal; another tenant, version, base or set of rotary factors cannot produce the same name. Blocks before the
first token that an activated LoRA changes are the base's own, by their names too; the first that it changes is named by
the digest and that token's place.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import sha256

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request


@dataclass(slots=True)
class PrefixCacheStats:
    """Tokens of admitted requests, and how many of them the cache gave."""

    hit_tokens: int = 0
    query_tokens: int = 0


class PrefixCache:
    """Names of full blocks, and which block holds each. Also which names are being computed right now."""

    def __init__(self, base_digest: str, block_size: int) -> None:
        self.stats = PrefixCacheStats()
        self._base_digest = base_digest
        self._block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, tuple[bytes, AdapterDigest | None]] = {}
        self._blocks_of_adapter: dict[AdapterDigest | None, set[int]] = {}
        self._computing: dict[bytes, str] = {}  # name -> id of the request that will fill it

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._name_of

    def match(self, request: Request) -> list[int]:
        """Blocks of the longest known prefix, always leaving at least one token to compute. Hashes lazily."""
        found: list[int] = []
        for index in range(self._num_readable(request)):
            block_id = self._block_of.get(self.name(request, index))
            if block_id is None:
                break
            found.append(block_id)
        return found

    def is_being_computed(self, request: Request, index: int) -> bool:
        """Whether a running request is about to fill block `index` of this one, so that waiting for it saves work."""
        return index < self._num_readable(request) and self.name(request, index) in self._computing

    def record(self, request: Request, num_hit_tokens: int) -> None:
        """Count one admission."""
        self.stats.hit_tokens += num_hit_tokens
        self.stats.query_tokens += request.num_tokens

    def announce(self, request: Request) -> None:
        """The request runs from `num_computed_tokens` on: its further full blocks are being computed."""
        first = request.num_computed_tokens // self._block_size
        for index in range(first, request.num_tokens // self._block_size):
            self._computing.setdefault(self.name(request, index), request.id)

    def withdraw(self, request: Request) -> None:
        """The request stops running: it will not compute its announced blocks."""
        for name in request.block_hashes[request.num_computed_tokens // self._block_size :]:
            self._forget_announcement(name, request)

    def insert(self, request: Request, index: int) -> None:
        """Block `index` of the request is full and computed. The first block to carry a name keeps it."""
        name, block_id = self.name(request, index), request.block_ids[index]
        self._forget_announcement(name, request)
        if name in self._block_of or block_id in self._name_of:
            return
        self._block_of[name] = block_id
        adapter = None if index < self._first_changed(request) else request.adapter
        self._name_of[block_id] = (name, adapter)
        self._blocks_of_adapter.setdefault(adapter, set()).add(block_id)

    def remove(self, block_id: int) -> None:
        """Make this block unreadable, if it is not already."""
        known = self._name_of.pop(block_id, None)
        if known is None:
            return
        name, adapter = known
        del self._block_of[name]
        blocks = self._blocks_of_adapter[adapter]
        blocks.remove(block_id)
        if not blocks:
            del self._blocks_of_adapter[adapter]

    def blocks_of(self, adapter: AdapterDigest | None) -> list[int]:
        """Blocks computed under this adapter, in block order."""
        return sorted(self._blocks_of_adapter.get(adapter, ()))

    def name(self, request: Request, index: int) -> bytes:
        """Chain hash of the request's full block `index`; each block is hashed once in a request's life."""
        names, size = request.block_hashes, self._block_size
        while len(names) <= index:
            start = len(names) * size
            parent = self._parent(request, len(names))
            token_ids = array("I", request.tokens(start, start + size))
            names.append(sha256(parent + token_ids.tobytes()).digest())
        return names[index]

    def _first_changed(self, request: Request) -> int:
        """The first block with a token that the request's adapter changes."""
        return request.active_from // self._block_size

    def _parent(self, request: Request, index: int) -> bytes:
        first = None if request.active_from else request.adapter
        before = request.block_hashes[index - 1] if index else self._root(request, first)
        if not request.active_from or index != self._first_changed(request):
            return before
        own = f"{request.adapter} {request.active_from}".encode()
        return sha256(before + own).digest()

    def _root(self, request: Request, adapter: AdapterDigest | None) -> bytes:
        root = sha256()
        for part in (request.cache_salt, adapter or "", self._base_digest, str(request.rope_set)):
            encoded = part.encode()
            root.update(len(encoded).to_bytes(8, "big") + encoded)
        return root.digest()

    def _num_readable(self, request: Request) -> int:
        if request.params.needs_all_positions:
            return 0
        return (request.num_tokens - 1) // self._block_size

    def _forget_announcement(self, name: bytes, request: Request) -> None:
        if self._computing.get(name) == request.id:
            del self._computing[name]
