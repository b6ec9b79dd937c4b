"""The world of `engine_world` around the real Engine and a device that is behind: what is launched runs later, in
order, as late as the moment at which its result is read. So code that counts on work that is only launched, or hands
out what such work still reads or writes, computes other tokens than `expected_output`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.layout import PackedAdapter
from server.engine.engine import Engine
from server.engine.model.forward import StepOutput
from server.engine.request import FinishReason, Request, Status, TokenEvent
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.text.output import OutputDelta, OutputState
from support.worlds.adapter_memory import FakeCopy, FakeDevice
from support.worlds.engine_world import World
from support.worlds.fake_chain import EMPTY, NAN, expected_output, first_state, next_state
from support.worlds.world_drafts import right_ones
from support.worlds.world_grammars import NUM_TOKENS, drawn

OUTCOMES = {"adapter_numerics": "numerics", "deadline_exceeded": "late"}


@dataclass
class StreamedCopy:
    """A copy on the side stream, which begins when the main stream has come to where it was asked for."""

    copy: FakeCopy
    has_begun: bool = False

    def __call__(self) -> bool:
        return self.has_begun and self.copy()


@dataclass
class StreamedDevice(FakeDevice):
    """`table` is what the host has asked for, `seen` what the device knows of it so far."""

    enqueue: Callable[[Callable[[], object]], None] = lambda work: None
    seen: dict[int, tuple[int, int, AdapterDigest]] = field(default_factory=dict)

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> StreamedCopy:  # type: ignore[override]
        entry = (offset, adapter.buffer.numel(), adapter.digest)
        self.enqueue(lambda: self.seen.update({slot: entry}))
        return super().start(slot, offset, adapter)  # type: ignore[return-value]

    def move(self, slot: int, source: int, target: int, num_elements: int) -> StreamedCopy:  # type: ignore[override]
        entry = (target, num_elements, self.table[slot][2])
        self.enqueue(lambda: self.seen.update({slot: entry}))
        return super().move(slot, source, target, num_elements)  # type: ignore[return-value]

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.enqueue(lambda: self.seen.pop(slot))

    def read(self, slot: int) -> int:
        return self._read(slot, *self.seen[slot])

    def _begin(self, copy: FakeCopy) -> StreamedCopy:  # type: ignore[override]
        streamed = StreamedCopy(copy)

        def begin() -> None:
            streamed.has_begun = True
            super(StreamedDevice, self)._begin(copy)

        self.enqueue(begin)
        return streamed


@dataclass(eq=False)
class SimulatedForward:
    """A launched forward: rows as they were, with the blocks and slots of that moment, and how far the request had been
    written. states: once it has run."""

    runner: AheadRunner
    rows: list[tuple[ScheduledRow, list[int], int | None, int]]
    before: SimulatedForward | None
    may_be_followed: bool
    states: dict[str, list[int]] = field(default_factory=dict)  # behind the request's last token, and its draft's
    has_run: bool = False

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        return self.runner.read(self, rows)


class AheadRunner:
    """Launches into the world's stream. Now and then sampling needs the host, a row gets no token, a forward fails."""

    def __init__(self, world: AheadWorld) -> None:
        self._world = world
        self.num_undecided = self.num_failed = 0

    def launch(self, schedule: Schedule) -> SimulatedForward:
        self._world.check_chosen(schedule)
        is_plain = schedule.num_decodes == len(schedule.rows) and all(row.samples for row in schedule.rows)
        is_plain &= not any(row.request.constraint for row in schedule.rows)
        return self._enqueue(schedule, None, is_plain and self._happens(0.97))

    def launch_after(self, pending: SimulatedForward, schedule: Schedule) -> SimulatedForward | None:
        self._world.check_ahead(pending, schedule)
        return None if self._happens(0.01) else self._enqueue(schedule, pending, self._happens(0.97))

    def run(self, schedule: Schedule) -> StepOutput:
        return self._enqueue(schedule, None, False).read(schedule.rows)

    def zero_blocks(self, block_ids: list[int]) -> None:
        world = self._world
        world.enqueue(lambda: [world.kv.__setitem__(block_id, [EMPTY] * 4) for block_id in block_ids])

    def forget(self, request_id: str) -> None:
        assert self._world.scheduler._requests.get(request_id) is None

    def read(self, pending: SimulatedForward, rows: Sequence[ScheduledRow]) -> StepOutput:
        world, output = self._world, StepOutput()
        while not pending.has_run:
            world.run_one()
        if self._happens(world.ahead.failures):
            self.num_failed += 1
            raise RuntimeError("the device lost this step")
        for row in rows:
            state = pending.states[row.request.id][0]
            if not row.samples:
                continue
            if row.draft and state == NAN:
                output.undecided.append(row.request)
            elif row.draft:
                token, *others = right_ones(row.draft, pending.states[row.request.id])
                output.tokens[row.request.id] = token
                output.followers[row.request.id] = [(other, None) for other in others]
                world.drafts.num_right += len(others)
            elif state == NAN:
                world.check_blame(row.request)
                output.non_finite.append(row.request)
            elif pending.before is not None and self._happens(world.ahead.undecided):
                self.num_undecided += 1
                output.undecided.append(row.request)
            else:
                output.tokens[row.request.id] = drawn(state, row.request.constraint, row.request.output_ids)
        return output

    def _enqueue(self, schedule: Schedule, before: SimulatedForward | None, may_be_followed: bool) -> SimulatedForward:
        rows = [
            (row, list(row.request.block_ids), row.request.slot, row.request.num_written_tokens)
            for row in schedule.rows
        ]
        pending = SimulatedForward(self, rows, before, may_be_followed)
        tokens = (
            None
            if before
            else [
                [*row.request.tokens(row.start, row.start + row.num_tokens - len(row.draft)), *row.draft]
                for row in schedule.rows
            ]
        )
        self._world.enqueue(lambda: self._world.forward(pending, tokens))
        return pending

    def _happens(self, share: float) -> bool:
        return self._world.random.random() < share


class ScriptedOutput:
    """An output that ends where it cannot be foreseen: at `stop_at` tokens, or at max_tokens."""

    def __init__(self, world: AheadWorld, request: Request) -> None:
        self._world, self._request = world, request
        self._stop_at = world.random.randint(1, 30)
        self.num_tokens = self.num_reasoning_tokens = 0

    def append(self, token_id: int) -> OutputDelta:
        self.num_tokens += 1
        assert self._request.output_ids[-1] == token_id
        if self.num_tokens == min(self._stop_at, self._request.params.max_tokens):
            self._world.check_answer_so_far(self._request)
            return OutputDelta("", "stop" if self.num_tokens == self._stop_at else "length")
        return OutputDelta("")

    def finish(self, reason: FinishReason) -> OutputDelta:
        if reason == "stop":  # its grammar allows nothing more
            self._world.check_answer_so_far(self._request)
        return OutputDelta("", reason)


@dataclass(frozen=True, kw_only=True)
class AheadSettings:
    """Shares: of rows launched ahead that get no token; of forwards that fail as they are read."""

    undecided: float = 0.01
    failures: float = 0.004


@dataclass
class AheadWorld(World):
    """One Engine, stepped; forwards are launched ahead wherever it finds that they may be."""

    ahead: AheadSettings = field(default_factory=AheadSettings)

    def __post_init__(self) -> None:
        self._stream: deque[Callable[[], object]] = deque()
        self._violations: list[str] = []
        super().__post_init__()
        self.runner = AheadRunner(self)
        self.engine = Engine(self.scheduler, self.tiers, self.runner, self._make_output)

    def _make_device(self) -> FakeDevice:
        elements, tag_of = self.settings.pool_elements, self.tags.__getitem__
        return StreamedDevice(elements, tag_of, self._copy_ticks, enqueue=self.enqueue)

    def _make_output(self, request: Request) -> OutputState:
        return ScriptedOutput(self, request)  # type: ignore[return-value]

    def step(self, *, arrivals: bool = True) -> None:
        self._pass_time(arrivals=arrivals)
        for _ in range(self.random.randrange(8)):  # the device is now fast, now slow
            if self._stream:
                self.run_one()
        self._engine_step()

    def _engine_step(self) -> None:
        self._count_starving()
        events = self.engine.step()
        assert not self._violations, self._violations
        assert self.engine.stats().counters["isolated_steps"] <= self.runner.num_failed
        for event in events:
            self._told(event)
        if self.num_steps % self.settings.check_every == 0:
            self.check()

    def enqueue(self, work: Callable[[], object]) -> None:
        """On the device's one stream."""
        self._stream.append(work)

    def run_one(self) -> None:
        """The device finishes one piece of its work."""
        with self.noted():
            self._stream.popleft()()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The engine answers every error of a forward by running its rows one by one: what is asserted is kept here."""
        try:
            yield
        except AssertionError as error:
            self._violations.append(str(error))
            raise

    def forward(self, pending: SimulatedForward, tokens: list[list[int]] | None) -> None:
        """On the device. tokens None: those that the forward before has drawn, 0 where it drew none."""
        pending.has_run = True
        for index, (row, blocks, slot, num_written) in enumerate(pending.rows):
            request = row.request
            if tokens is None:
                assert pending.before is not None
                [state] = pending.before.states[request.id]
                ids = [0 if state == NAN else state % NUM_TOKENS]
            else:
                ids = tokens[index]
            states = self._compute(request, row.start, ids, blocks, slot)
            pending.states[request.id] = states[len(ids) - len(row.draft) - 1 :]
            self._check_rest(request, blocks, max(num_written, row.start + len(ids)))

    def _compute(self, request: Request, start: int, ids: list[int], blocks: list[int], slot: int | None) -> list[int]:
        weight = 7 if slot is None else self.device.read(slot)
        state = self.state_before(request, start, blocks)
        if self.random.random() < self.settings.numeric_failures:
            self.injected.add((request.tenant, request.adapter))
            weight = NAN
        states = []
        for position, token in enumerate(ids, start=start):
            state = next_state(state, token, weight)
            self.kv[blocks[position // 4]][position % 4] = state
            states.append(state)
        return states

    def _check_rest(self, request: Request, blocks: list[int], end: int) -> None:
        """Beyond what it has written itself, in rows that were thrown away too, there is no other request's poison.
        (Its own a forward does not read: attention ends at the row's position, and the next row overwrites it.)"""
        if end % 4:
            rest = self.kv[blocks[end // 4]][end % 4 :]
            assert NAN not in rest, f"{request.id} was given a block with poison in it"

    def check_chosen(self, schedule: Schedule) -> None:
        """A forward that nothing precedes: everything that holds for any."""
        with self.noted():
            self._check_schedule(schedule, self.scheduler.running)

    def check_ahead(self, pending: SimulatedForward, schedule: Schedule) -> None:
        """A forward that continues one whose tokens are not known yet."""
        with self.noted():
            starts = {row.request.id: row.start for row, *_ in pending.rows}
            assert schedule.rows, "a forward without rows was launched"
            assert schedule.num_tokens == schedule.num_decodes == len(schedule.rows) <= len(pending.rows)
            for row in schedule.rows:
                request = row.request
                assert request.status is Status.RUNNING
                assert (row.start, row.num_tokens) == (starts[request.id] + 1, 1)
                assert len(request.block_ids) * 4 > row.start
                assert len(request.output_ids) + 2 <= request.params.max_tokens, (
                    f"{request.id} has its last token already"
                )

    def check_answer_so_far(self, request: Request) -> None:
        """What it has been given is the start of its answer, and what it keeps is what it computed."""
        weight = 7 if request.adapter is None else self.tags[request.adapter]
        answer = expected_output(request, weight, self.settings.rope_switches)
        assert request.output_ids == answer[: len(request.output_ids)], f"{request.id} answered wrongly"
        self.check_grammar(request)
        state = first_state(request, request.num_computed_tokens, self.settings.rope_switches)
        for position in range(request.num_computed_tokens):
            state = next_state(state, request.token_at(position), weight)
            assert self._cell(request, position) == state, f"{request.id}: position {position} was overwritten"

    def check_blame(self, request: Request) -> None:
        with self.noted():
            self._check_blame(request)

    def add(self, request: Request) -> None:
        super().add(request)
        if request.id in self.alive:
            self.engine._outputs[request.id] = self._make_output(request)

    def _abort(self, request_id: str) -> None:
        event = self.engine.abort(request_id)
        if event is None:  # its adapter was just quarantined, which the next step reports
            assert self.scheduler._requests.get(request_id) is None
            return
        self._told(event)
        assert self.engine.abort(request_id) is None

    def _told(self, event: TokenEvent) -> None:
        if event.finish_reason is None:
            return
        request, _ = self.alive[event.request_id]
        if event.error is not None:
            self._end(request, OUTCOMES.get(event.error.code, event.error.code))
        else:
            is_whole = len(request.output_ids) == request.params.max_tokens
            assert is_whole or event.finish_reason != "length", f"{request.id} was cut off"
            self._end(request, "abort" if event.finish_reason == "abort" else "finished")

    def check_at_rest(self) -> None:
        self.engine.step()  # drops what was launched for requests that have ended since
        while self._stream:
            self.run_one()
        super().check_at_rest()
