"""Builds an engine from a base and a store: loads the base, divides memory, joins the parts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from adapters_store.base.families import UnsupportedBase
from lora_kernels.process import release_compute_threads
from server.engine.device_fault import DeviceLost, device_error
from server.engine.engine import Engine
from server.engine.grammar.matcher import allowed_of
from server.engine.int8_probe import int8_probe
from server.engine.model.base_model import BaseModel, load_base, pick_device
from server.engine.model.kv_tensors import KVCache
from server.engine.model.runner import ModelRunner
from server.engine.numerics import Quarantine, TenantAdapter
from server.engine.request import Request
from server.engine.sampling.sampler import Sampler
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from server.engine.scheduling.scheduler import Scheduler
from server.engine.startup.adapter_parts import AdapterParts, AdapterSource
from server.engine.startup.gpu_start import GpuStart, check_step_size, default_step, prepare, record_graphs
from server.engine.startup.memory_plan import MemoryPlan, plan_memory
from server.engine.startup.settings import EngineSettings
from server.engine.startup.start_probe import probe
from server.engine.text.output import OutputState
from server.engine.text.tokenizer import Tokenizer
from server.engine.text.vocabulary import Vocabulary
from server.engine.worker import EngineWorker

if TYPE_CHECKING:
    from server.engine.tensor_parallel.leader import Leader

_MAX_NAMED = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineParts:
    """A built engine; `close()` ends its threads."""

    worker: EngineWorker
    engine: Engine
    base: BaseModel
    plan: MemoryPlan
    adapters: AdapterParts
    leader: Leader | None = None

    def close(self) -> None:
        self.worker.stop()
        if self.leader is not None:
            self.leader.close()
        self.adapters.close()


def build_engine(
    settings: EngineSettings, source: AdapterSource, *, report_progress: Callable[[str], None] = lambda text: None
) -> EngineParts:
    """Load the base and join the parts; the worker is not started. `report_progress` gets a line for each step.

    Raises UnsupportedBase if the base cannot be served, or not on this machine.
    """
    check_step_size(pick_device(settings.device), settings.scheduler.tokens_per_step)
    tokenizer = Tokenizer.load(settings.base)  # first: it refuses before minutes of loading
    report_progress(f"loading {settings.base}")
    if settings.tensor_parallel > 1:
        return _build_on_ranks(tokenizer, settings, source, report_progress)
    base = load_base(
        settings.base,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        name=settings.served_name,
    )
    return join_engine(base, tokenizer, settings, source, report_progress=report_progress)


def _build_on_ranks(
    tokenizer: Tokenizer, settings: EngineSettings, source: AdapterSource, report_progress: Callable[[str], None]
) -> EngineParts:
    from server.engine.tensor_parallel.leader import Leader
    from server.engine.tensor_parallel.sharded_base import cuts_of

    num_ranks, threads = settings.tensor_parallel, settings.compute_threads
    cuts = cuts_of(
        settings.base, num_ranks, dtype=settings.dtype, quantize=settings.quantize, name=settings.served_name
    )
    report_progress(f"starting {num_ranks} ranks, each of which loads its part of {settings.base}")
    leader = Leader(num_ranks, pick_device(settings.device))
    try:
        base = leader.load_base(settings.base, cuts, num_threads=threads)
        settings = replace(settings, cuda_graphs=False, cpu_replays=False)  # a recording has no sums
        return join_engine(base, tokenizer, settings, source, report_progress=report_progress, leader=leader)
    except DeviceLost as error:
        leader.close()
        raise UnsupportedBase(f"--tensor-parallel {num_ranks}: {error}") from error
    except BaseException:
        leader.close()
        raise


def join_engine(
    base: BaseModel,
    tokenizer: Tokenizer,
    settings: EngineSettings,
    source: AdapterSource,
    *,
    report_progress: Callable[[str], None] = lambda text: None,
    leader: Leader | None = None,
) -> EngineParts:
    """The same over a loaded base: settings that concern loading are ignored. leader: of the ranks that share it."""
    settings = replace(settings, scheduler=settings.scheduler.with_defaults(default_step(base.device)))
    max_model_len = _context_of(base, settings)
    start = prepare(base, settings, max_context=max_model_len, report_progress=report_progress)
    report_progress("dividing memory")
    plan = _planned(base, settings, start, max_model_len)
    adapters = AdapterParts(base, plan, source, max_adapters=settings.max_adapters, leader=leader)
    blocks = _blocks(settings, base, plan)
    scheduler = Scheduler(settings.scheduler, blocks, adapters.tiers, max_model_len=max_model_len)
    cache = KVCache.allocate(base, num_blocks=plan.num_blocks, block_size=plan.block_size)
    vocabulary = _vocabulary(base, tokenizer)
    if leader is not None:
        leader.allocate(cache, adapters.table)
    sampler = Sampler(tokenizer.eos_ids, masks=allowed_of)
    runner = ModelRunner(base, cache, adapters.table, sampler, vocabulary, others=leader)
    report_progress("probing the base with two short prompts")
    probe(runner, vocabulary, settings.base)
    record_graphs(start, runner, max_context=max_model_len, report_progress=report_progress)
    if settings.cpu_replays:
        runner.replay_on_cpu()
    engine = Engine(
        scheduler,
        adapters.tiers,
        runner,
        _output_factory(tokenizer),
        load_seconds=adapters.load_seconds,
        quarantine=_quarantine_on_a_thread(source),
        device_error=partial(device_error, base.device) if leader is None else leader.device_error,
    )
    worker = EngineWorker(
        engine,
        base.description,
        tokenizer,
        vocabulary,
        max_model_len=max_model_len,
        num_threads=settings.compute_threads,
        slices=adapters.slices if base.device.type == "cpu" else None,  # on a GPU loading costs a step nothing
        int8_probe=int8_probe(base, tokenizer, vocabulary) if leader is None else leader.int8_probe,
    )
    if leader is not None:
        leader.followers.watch(worker.end)
    release_compute_threads()  # this thread loaded the base; from now on only the engine's thread computes
    adapters.host.start(worker.wake)
    return EngineParts(worker, engine, base, plan, adapters, leader)


def _context_of(base: BaseModel, settings: EngineSettings) -> int:
    """Tokens of prompt and answer. Raises UnsupportedBase if the base takes fewer than asked for."""
    asked = settings.max_model_len or base.max_model_len
    if asked > base.max_model_len:
        raise UnsupportedBase(f"max_model_len: the base takes {base.max_model_len} tokens, got {asked}")
    return asked


def _planned(base: BaseModel, settings: EngineSettings, start: GpuStart, max_model_len: int) -> MemoryPlan:
    return plan_memory(
        base,
        settings.memory,
        block_size=settings.block_size,
        max_tokens_useful=max_model_len * settings.scheduler.running_slots,
        reserved=start.reserved,
        num_ranks=settings.tensor_parallel,
    )


def _quarantine_on_a_thread(source: AdapterSource) -> Quarantine:
    """On a short-lived thread: the engine's must not wait for a database."""

    def quarantine(owned: TenantAdapter, code: str, message: str) -> None:
        write = partial(source.quarantine_adapter, owned.digest, code, message, tenant=owned.tenant)
        threading.Thread(target=write, name="quarantine").start()

    return quarantine


def _vocabulary(base: BaseModel, tokenizer: Tokenizer) -> Vocabulary:
    """Raises UnsupportedBase if tokenizer and model have no token in common."""
    try:
        vocabulary = tokenizer.vocabulary(base.num_embeddings)
    except ValueError as error:
        raise UnsupportedBase(f"{base.description.name}: {error}") from error
    if vocabulary.unread:
        some = ", ".join(f"{id_} {token!r}" for id_, token in sorted(vocabulary.unread.items())[:_MAX_NAMED])
        message = "%s: %d tokens have no embedding row; prompts with them are refused: %s"
        _log.warning(message, base.description.name, len(vocabulary.unread), some)
    return vocabulary


def _blocks(settings: EngineSettings, base: BaseModel, plan: MemoryPlan) -> BlockPool:
    kv_settings = KVCacheSettings(
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        enable_prefix_cache=settings.prefix_cache,
        rope_switches=base.rope_switches,
    )
    return BlockPool(kv_settings, base.description.digest)


def _output_factory(tokenizer: Tokenizer) -> Callable[[Request], OutputState]:
    return lambda request: OutputState(request.params, tokenizer.token_texts, tokenizer.eos_ids, request.prompt_ids)
