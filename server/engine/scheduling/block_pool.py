"""Decides which request owns which KV block. Knows block ids, reference counts and the prefix cache; knows no tensors.

A free block that still carries a name stays readable until it is handed out again, so the free list is also the
prefix cache's LRU list (vLLM v1's design).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request
from server.engine.scheduling.prefix_cache import PrefixCache, PrefixCacheStats


@dataclass(frozen=True, kw_only=True)
class KVCacheSettings:
    """block_size: tokens per block, a power of two. num_blocks: blocks in the whole cache.

    rope_switches: lengths, rising; a sequence of more tokens than one of them has other keys than before (LongRoPE).
    """

    num_blocks: int
    block_size: int = 16
    enable_prefix_cache: bool = True
    rope_switches: tuple[int, ...] = ()


class BlockPool:
    """Reference-counted blocks 0..num_blocks-1."""

    def __init__(self, settings: KVCacheSettings, base_digest: str) -> None:
        self.settings = settings
        self.block_size = settings.block_size
        self.outgrown_at = frozenset(length + 1 for length in settings.rope_switches)
        self._ref_counts = [0] * settings.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(settings.num_blocks))  # next to go first
        self._cache = PrefixCache(base_digest, settings.block_size)
        self._poisoned: set[int] = set()
        self._to_zero: list[int] = []

    @property
    def num_blocks(self) -> int:
        return self.settings.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without an owner, readable through the prefix cache or not."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0..1."""
        return 1.0 - len(self._free) / self.settings.num_blocks

    @property
    def stats(self) -> PrefixCacheStats:
        return self._cache.stats

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def has_outgrown(self, request: Request) -> bool:
        """Whether its keys were made with the factors of a shorter sequence, so that none is valid."""
        return request.rope_set != self._rope_set(request)

    def match(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix. Takes no reference and changes nothing but the request's hashes, and
        the set of rotary factors that they stand for."""
        if self.has_outgrown(request):
            assert not request.block_ids, f"{request.id} holds keys of other factors"
            request.rope_set, request.block_hashes = self._rope_set(request), []
        return self._cache.match(request) if self.settings.enable_prefix_cache else []

    def is_being_computed(self, request: Request, index: int) -> bool:
        """Whether a running request will soon have filled this request's block `index`."""
        return self.settings.enable_prefix_cache and self._cache.is_being_computed(request, index)

    def admit(self, request: Request, matched: list[int], *, num_spare: int) -> bool:
        """Give the request all blocks of its tokens, reading `matched`; False, changing nothing, if short of blocks.

        num_spare: free blocks that must be left over.
        """
        if self.num_missing(request, matched, num_spare=num_spare) > 0:
            return False
        self._share(matched)  # before allocating, which may evict unowned blocks
        request.block_ids = matched + self.allocate(self.blocks_for(request.num_tokens) - len(matched))
        request.num_computed_tokens = request.num_verified_tokens = len(matched) * self.block_size
        if self.settings.enable_prefix_cache:
            if request.first_scheduled_s is None:
                self._cache.record(request, request.num_computed_tokens)
            self._cache.announce(request)
        return True

    def num_missing(self, request: Request, matched: list[int], *, num_spare: int) -> int:
        """How many blocks are missing to admit it; 0 or less if there are enough."""
        num_new = self.blocks_for(request.num_tokens) - len(matched)
        num_revived = sum(self._ref_counts[block_id] == 0 for block_id in matched)
        return num_spare + num_new + num_revived - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take blocks off the free list, those without a name and then the longest unused first."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in taken:
            self._cache.remove(block_id)
            self._ref_counts[block_id] = 1
        return taken

    def release(self, request: Request, num_written: int) -> None:
        """The request stops running: take back all of its blocks. What it computed stays readable.

        num_written: tokens a forward may have written. Those that no finite sample has confirmed may hold NaN, so their
        blocks are discarded.
        """
        if self.settings.enable_prefix_cache:
            self._cache.withdraw(request)
        if num_written > request.num_verified_tokens:
            first = request.num_verified_tokens // self.block_size
            self.discard(request.block_ids[first : self.blocks_for(num_written)])
        # Last block first: a prefix's tail is worth less than its head, and LRU hands out the oldest entry first.
        self.free(reversed(request.block_ids))
        request.block_ids = []
        request.num_computed_tokens = request.num_verified_tokens = request.num_written_tokens = 0

    def free(self, block_ids: Iterable[int]) -> None:
        """Give up one reference on each block."""
        for block_id in block_ids:
            count = self._ref_counts[block_id]
            assert count > 0, f"block {block_id} freed twice"
            self._ref_counts[block_id] = count - 1
            if count == 1:
                self._enlist(block_id)

    def register(self, request: Request, num_before: int) -> None:
        """Tokens `num_before`..`num_computed_tokens` are computed now: full blocks among them become readable."""
        if self.settings.enable_prefix_cache:
            for index in range(num_before // self.block_size, request.num_computed_tokens // self.block_size):
                self._cache.insert(request, index)

    def discard(self, block_ids: Iterable[int]) -> None:
        """These blocks may hold numbers that are not finite: make them unreadable, and have them zeroed before reuse.

        A block may still be shared. It is left alone until its last owner gives it up, because zeroing it under a
        healthy reader would change that reader's answer in silence.
        """
        for block_id in block_ids:
            self._cache.remove(block_id)
            self._poisoned.add(block_id)
            if self._ref_counts[block_id] == 0:
                self._enlist(block_id)

    def take_blocks_to_zero(self) -> list[int]:
        """Discarded blocks that have no owner any more, each once. Zero them before the next forward:
        they may be allocated already, and 0 x NaN in a masked position is NaN."""
        blocks, self._to_zero = self._to_zero, []
        return blocks

    def drop_adapter(self, digest: AdapterDigest) -> int:
        """Make every block computed under this adapter unreadable; how many there were."""
        dropped = self._cache.blocks_of(digest)
        for block_id in dropped:
            self._cache.remove(block_id)
            if self._ref_counts[block_id] == 0:
                self._enlist(block_id)
        return len(dropped)

    def _share(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def _enlist(self, block_id: int) -> None:
        """Put an unowned block on the free list: to the back if it can be read again, else to the front."""
        if block_id in self._poisoned:
            self._poisoned.remove(block_id)
            self._to_zero.append(block_id)
        self._free[block_id] = None
        if block_id not in self._cache:
            self._free.move_to_end(block_id, last=False)

    def _rope_set(self, request: Request) -> int:
        return bisect_left(self.settings.rope_switches, request.num_tokens)
