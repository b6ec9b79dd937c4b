"""A further rank, as a process: `python -m server.engine.tensor_parallel.follower FD RANK SIZE RENDEZVOUS TIMEOUT_S
DEVICE`. It does what the messages on the pipe FD say, in their order, and ends with the first rank.

Knows no requests: which tokens run, in which blocks and with which adapters, is decided by the first rank alone.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.layout import PackedAdapter
from server.engine.model.adapter_copier import empty_table
from server.engine.model.base_model import BaseModel
from server.engine.model.kv_tensors import KVCache
from server.engine.model.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.tensor_parallel.messages import (
    Allocate,
    ClearSlot,
    LoadAdapter,
    LoadBase,
    Message,
    Step,
    Stop,
    ZeroBlocks,
    received,
)
from server.engine.tensor_parallel.ranks import Ranks
from server.engine.tensor_parallel.sharded_base import cuts_of, load_shard

_log = logging.getLogger(__name__)


class Follower:
    """The device of one rank: its part of the base, of the caches and of each adapter."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._base: BaseModel | None = None
        self._runner: ModelRunner | None = None

    def do(self, message: Message) -> None:
        match message:
            case Step():
                runner = self._running
                runner.forward(message.batch(runner.table, self._ranks.device))
            case ZeroBlocks():
                self._running.zero_blocks(message.block_ids)
            case LoadAdapter():
                self._load(message)
            case ClearSlot():
                self._running.table.clear_slot(message.slot)
            case Allocate():
                self._allocate(message)
            case LoadBase():
                torch.set_num_threads(message.num_threads)
                path, size = Path(message.path), self._ranks.size
                cuts = cuts_of(path, size, dtype=message.dtype, quantize=message.quantize)
                self._base = load_shard(path, cuts, self._ranks)
            case Stop():
                raise EOFError

    @property
    def _running(self) -> ModelRunner:
        assert self._runner is not None, "a step before its caches"
        return self._runner

    def _allocate(self, sizes: Allocate) -> None:
        assert self._base is not None, "caches before the base"
        base = self._base
        arena = torch.zeros(sizes.arena_elements, dtype=base.dtype, device=base.device)
        cache = KVCache.allocate(base, num_blocks=sizes.num_blocks, block_size=sizes.block_size)
        self._runner = ModelRunner(base, cache, empty_table(base.description, arena, sizes.num_slots), Sampler())
        self._ranks.open()

    def _load(self, message: LoadAdapter) -> None:
        """The copy has ended when this returns, so also before the next step."""
        table, base = self._running.table, self._running.base
        buffer = torch.from_numpy(message.data).view(base.dtype)
        adapter = PackedAdapter(AdapterDigest(""), buffer, message.modules, message.is_int8)
        places = adapter.places(base.description.module_index)
        table.set_slot(message.slot, message.offset, *places, is_int8=message.is_int8)
        table.arena[message.offset : message.offset + len(buffer)] = buffer.to(table.arena.device)


@torch.inference_mode()
def follow(connection: Connection, ranks: Ranks) -> None:
    """Do what comes, until the first rank ends. What needs an answer gets one: an error's text, or nothing."""
    follower = Follower(ranks)
    try:
        while True:
            message = received(connection)
            follower.do(message)
            if isinstance(message, (LoadBase, Allocate)):
                connection.send_bytes(b"")
    except EOFError:
        return
    except Exception as error:
        connection.send_bytes(f"{type(error).__name__}: {error}".encode())
        raise


def main(fd: str, rank: str, size: str, rendezvous: str, *rest: str) -> None:
    """rest: TIMEOUT_S DEVICE."""
    logging.basicConfig(format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a supervisor may send them to all: the first rank drains
    connection, timeout_s, device = Connection(int(fd)), float(rest[0]), torch.device(rest[1])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        connection.send_bytes(b"")  # torch is imported: a rank that cannot start is known before the others wait for it
        follow(connection, Ranks(int(rank), int(size), device, Path(rendezvous), timeout_s))
    finally:
        shutil.rmtree(Path(rendezvous).parent, ignore_errors=True)  # a first rank that was killed leaves its folder


if __name__ == "__main__":
    main(*sys.argv[1:])
