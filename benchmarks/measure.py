"""Has the contenders take turns: round by round, in random order, at the same work."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import psutil  # type: ignore[import-untyped]
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from .contenders import Contender, Servers, add_rows, round_trip
from .proxy import proxy
from .results import Cell, Results
from .work import BOTS, OPERATIONS, Act, Work, conversation, fill, named, on_data

TIMEOUT = 60.0  # seconds for the work of one turn
ROUND_TRIP = "one round trip"


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    rounds: int = 11
    operations: int = 32
    """In a turn; fewer where an operation takes long, more where there are many tasks."""
    tasks: Sequence[int] = (1, 16, 64)
    delays: Sequence[float] = (0.0, 0.005)
    rows: Sequence[int] = (100, 10_000, 1_000_000)
    sizes: Sequence[int] = (100, 10_000, 1_000_000)
    memory: int = 1_000
    """Operations after which to look at the memory; the figures are for 10,000."""


SMOKE = Scale(
    rounds=1,
    operations=2,
    tasks=(1, 2),
    delays=(0.0, 0.001),
    rows=(10, 1000),
    sizes=(100, 10_000),
    memory=40,
)

Opened: TypeAlias = dict[str, BaseStorage]
Advance: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """A cell, and how the contenders fill it."""

    cell: Cell
    work: Work
    tasks: int
    operations: int
    key: Callable[[int], StorageKey] = conversation


@dataclass
class Run:
    """A run of the benchmark."""

    servers: Servers
    contenders: list[Contender]
    scale: Scale
    advance: Advance
    stack: AsyncExitStack
    """Keeps open what several sections use."""
    results: Results = field(default_factory=Results)
    _opened: Opened = field(default_factory=dict)

    def compared(self, *servers: str) -> list[Contender]:
        """Return the contenders on these kinds of servers that are there."""
        return [
            each
            for each in self.contenders
            if each.server in self.servers and (not servers or each.server in servers)
        ]

    async def operations(self) -> None:
        """Measure each operation, at 1 and more tasks."""
        await self._at_tasks("operations", OPERATIONS, self.scale.operations)

    async def bots(self) -> None:
        """Measure updates that go through a dispatcher to a bot."""
        rounds = (self.scale.rounds + 3) // 4
        await self._at_tasks("bots", BOTS, max(1, self.scale.operations // 8), rounds)

    async def _at_tasks(
        self, section: str, works: list[Work], operations: int, rounds: int | None = None
    ) -> None:
        # A turn of two operations for each of 16 tasks would show little but how it begins.
        turns = [
            Turn(
                Cell(section, work.name, str(tasks)),
                work,
                tasks,
                max(operations, 2 * tasks, min(4 * operations, 8 * tasks)),
            )
            for tasks in self.scale.tasks
            for work in works
        ]
        await self._rounds(await self._all(), turns, rounds)

    async def network(self) -> None:
        """Measure reads, writes and steps with a network in between that takes its time."""
        measured = [each for each in self.compared("postgresql", "redis") if not each.is_raito]
        async with AsyncExitStack() as stack:
            for delay in self.scale.delays:
                servers = self._behind_proxies(stack, delay)
                opened = await self._open(stack, measured, servers, f"_{delay * 1000:.0f}ms")
                if "postgresql" in servers:
                    trip = await stack.enter_async_context(round_trip(servers["postgresql"], ""))
                    opened[ROUND_TRIP] = trip
                works = named(OPERATIONS, "set_state", "get_state", "step")
                turns = [
                    Turn(Cell("network", work.name, f"{delay * 1000:.0f} ms"), work, 1, few)
                    for work in works
                    for few in [max(2, self.scale.operations // 2)]
                ]
                await self._rounds(opened, turns)

    def _behind_proxies(self, stack: AsyncExitStack, delay: float) -> Servers:
        return {
            name: stack.enter_context(proxy(url, delay)).in_front_of(url)
            for name, url in self.servers.items()
            if name in ("postgresql", "redis")
        }

    async def trips(self) -> None:
        """Count statements and round trips of each operation."""
        for server in ("postgresql", "mysql", "redis"):
            if not (measured := self.compared(server)):
                continue
            with proxy(self.servers[server]) as between:
                servers = {server: between.in_front_of(self.servers[server])}
                async with AsyncExitStack() as stack:
                    opened = await self._open(stack, measured, servers, "_trips")
                    for name, storage in opened.items():
                        self.advance(f"round trips: {name}")
                        for work in OPERATIONS:
                            if work.suits(storage):
                                counted = await _counted(between.counts, storage, work)
                                self.results.trips[name][work.name] = counted

    async def memory(self) -> None:
        """Look at the memory after many operations."""
        operations = self.scale.memory
        step = named(OPERATIONS, "step")[0].act  # of four operations
        keys = [conversation(number) for number in range(10)]
        for name, storage in (await self._all()).items():
            self.advance(f"memory: {name}")
            await _repeat(step, storage, keys, 10)
            gc.collect()
            gc.freeze()
            resident = psutil.Process().memory_info().rss
            await _repeat(step, storage, keys, operations // 4)
            gc.collect()
            grown = psutil.Process().memory_info().rss - resident
            tracemalloc.start()
            await _repeat(step, storage, keys, 10)
            gc.collect()
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            await _repeat(step, storage, keys, operations // 4)
            gc.collect()
            after, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            gc.unfreeze()
            self.results.memory[name] = {
                "resident": grown / 1024 * 10_000 / operations,
                "retained": (after - before) / 1024 * 10_000 / operations,
                "peak": (peak - before) / 1024,
            }

    async def rows(self) -> None:
        """Measure reads and writes on tables of different sizes."""
        works = named(OPERATIONS, "get_state", "set_state")
        choose = random.Random(1)
        opened: Opened = {}
        turns: list[Turn] = []
        measured = [
            each for each in self.compared("postgresql", "sqlite") if each.is_ours or each.is_bare
        ]
        async with AsyncExitStack() as stack:
            for rows in self.scale.rows:
                suffix = f"_{rows}"
                some = await self._open(stack, measured, suffix=suffix, rows=rows)
                opened.update({f"{name}/{rows}": storage for name, storage in some.items()})
                keys = [conversation(choose.randint(1, rows)) for _ in range(997)]
                turns += [
                    Turn(
                        Cell("rows", work.name, f"{rows:,}"),
                        work,
                        1,
                        self.scale.operations,
                        lambda number, keys=keys: keys[number % len(keys)],  # type: ignore[misc]
                    )
                    for work in works
                ]
            await self._rounds(opened, turns)

    async def data(self) -> None:
        """Measure reads and writes of data of different sizes."""
        measured = [
            each
            for each in self.compared("postgresql", "redis", "sqlite", "memory")
            if not each.is_raito
        ]
        turns = [
            Turn(
                Cell("data", work.name, f"{size:,} B"),
                work,
                1,
                max(2, self.scale.operations // (8 if size >= 1_000_000 else 2)),
            )
            for size in self.scale.sizes
            for work in on_data(size)
        ]
        async with AsyncExitStack() as stack:
            opened = await self._open(stack, measured, suffix="_data")
            await self._rounds(opened, turns)

    async def _all(self) -> Opened:
        if not self._opened:
            self._opened = await self._open(self.stack, self.compared())
        return self._opened

    async def _open(
        self,
        stack: AsyncExitStack,
        contenders: list[Contender],
        servers: Servers | None = None,
        suffix: str = "",
        rows: int = 0,
    ) -> Opened:
        opened = {}
        for contender in contenders:
            self.advance(f"opening {contender.name}")
            url = (servers or self.servers)[contender.server]
            # Somebody else may be measuring on the same server.
            name = "".join(filter(str.isalnum, contender.name))
            table = f"benchmark_{os.getpid()}_{name}{suffix}"
            storage = await stack.enter_async_context(contender.open(url, table))
            if rows:
                add_rows(url, table, rows)
            try:
                await asyncio.wait_for(fill(storage, conversation(1)), TIMEOUT)
            except Exception as error:
                failed = self.results.cells[Cell("opening", "fill", "1")][contender.name]
                failed.failure = _in_short(error)
                continue
            opened[contender.name] = storage
        return opened

    async def _rounds(self, opened: Opened, turns: list[Turn], rounds: int | None = None) -> None:
        names = list(opened)
        # In a fixed order, some would always find the server warm from the one before.
        order = random.Random(1)
        gc.collect()
        gc.freeze()
        for number in range(-1, rounds or self.scale.rounds):  # the first one warms up
            for turn in turns:
                for name in names if number < 0 else order.sample(names, len(names)):
                    self.advance(f"{turn.cell.section}: {turn.cell.work}, {turn.cell.setting}")
                    await self._take(turn, name, opened[name], warms_up=number < 0)
        gc.unfreeze()

    async def _take(self, turn: Turn, name: str, storage: BaseStorage, warms_up: bool) -> None:
        name, _, rows = name.partition("/")
        if rows and f"{int(rows):,}" != turn.cell.setting:
            return
        if not turn.work.suits(storage) or (name == ROUND_TRIP and turn.work.name == "step"):
            return
        figures = self.results.cells[turn.cell][name]
        if figures.failure:
            return
        keys = [turn.key(number) for number in range(3 if warms_up else turn.operations)]
        try:
            if turn.work.prepare is not None:
                await _share(turn.work.prepare, storage, keys, turn.tasks)
            cpu, began = time.process_time(), time.perf_counter()
            latencies = await _share(turn.work.act, storage, keys, turn.tasks)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        except Exception as error:
            figures.failure = _in_short(error)
            return
        if not warms_up:
            units = len(keys) * turn.work.units
            figures.seconds.append(seconds / units)
            figures.cpu.append(cpu / units)
            figures.latencies += latencies


async def _share(act: Act, storage: BaseStorage, keys: list[StorageKey], tasks: int) -> list[float]:
    """Do the work for all keys in some tasks; return how long each took."""
    latencies = []
    left = iter(keys)

    async def work() -> None:
        for key in left:
            began = time.perf_counter()
            await act(storage, key)
            latencies.append(time.perf_counter() - began)

    ends = asyncio.gather(*(work() for _ in range(tasks)), return_exceptions=True)
    for end in await asyncio.wait_for(ends, TIMEOUT):
        if end is not None:
            raise end
    return latencies


async def _repeat(act: Act, storage: BaseStorage, keys: list[StorageKey], times: int) -> None:
    for number in range(times):
        await act(storage, keys[number % len(keys)])


async def _counted(
    counts: Callable[[], tuple[int, int]], storage: BaseStorage, work: Work, times: int = 4
) -> tuple[float, float]:
    keys = [conversation(number) for number in range(times)]
    for _ in range(4):  # until the drivers have prepared their statements
        await _share(fill, storage, keys, 1)
        await _share(work.act, storage, keys, 1)
    await _share(fill, storage, keys, 1)
    statements, trips = counts()
    await _share(work.act, storage, keys, 1)
    more_statements, more_trips = counts()
    return (more_statements - statements) / times, (more_trips - trips) / times


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
