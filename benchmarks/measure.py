"""What is measured of single operations, and of a storage as a whole."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tracemalloc
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import psutil
from aiogram.fsm.storage.base import BaseStorage, StorageKey

from .contenders import Contender, Servers, add_rows, round_trip
from .proxy import proxy
from .results import Cell, Results
from .turns import TIMEOUT, Advance, Turn, counted, in_short, take_turns
from .work import OPERATIONS, Act, conversation, fill, named, on_data

ROUND_TRIP = "one round trip"


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    rounds: int = 11
    operations: int = 32
    """In a turn; fewer where an operation takes long, more where there are many tasks."""
    tasks: Sequence[int] = (1, 16, 64)
    delays: Sequence[float] = (0.0, 0.005)
    """Of the network, for single operations."""
    updates: int = 4
    """Conversations with a bot in a turn, at least."""
    update_delays: Sequence[float] = (0.0, 0.001, 0.005)
    update_rounds: int = 5
    rows: Sequence[int] = (100, 10_000, 1_000_000)
    sizes: Sequence[int] = (100, 10_000, 1_000_000)
    memory: int = 1_000
    """Operations after which to look at the memory; the figures are for 10,000."""
    storage_rows: int = 1_000
    """Conversations of the tables whose growth is measured; four updates for each."""
    scaling_rows: Sequence[int] = (10_000, 100_000, 1_000_000)
    scaling_updates: int = 2_000
    processes: Sequence[int] = (1, 4, 16, 64)
    scaling_rounds: int = 3


SMOKE = Scale(
    rounds=1,
    operations=2,
    tasks=(2,),
    delays=(0.001,),
    updates=1,
    update_delays=(0.001,),
    update_rounds=1,
    rows=(10, 1000),
    sizes=(100, 10_000),
    memory=40,
    storage_rows=20,
    scaling_rows=(100, 1_000),
    scaling_updates=40,
    processes=(1, 2),
    scaling_rounds=1,
)

Opened: TypeAlias = dict[str, BaseStorage]


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
        few = self.scale.operations
        # A turn of two operations for each of 16 tasks would show little but how it begins.
        turns = [
            Turn(
                Cell("operations", work.name, str(tasks)),
                work,
                tasks,
                max(few, 2 * tasks, min(4 * few, 8 * tasks)),
            )
            for tasks in self.scale.tasks
            for work in OPERATIONS
        ]
        await self._rounds(await self._all(), turns)

    async def network(self) -> None:
        """Measure reads, writes and steps with a network in between that takes its time."""
        measured = [each for each in self.compared("postgresql", "redis") if not each.is_raito]
        async with AsyncExitStack() as stack:
            for delay in self.scale.delays:
                servers = self.behind_proxies(stack, delay)
                opened = await self.open(stack, measured, servers, f"_{delay * 1000:.0f}ms")
                if "postgresql" in servers:
                    trip = await stack.enter_async_context(round_trip(servers["postgresql"], ""))
                    opened[ROUND_TRIP] = trip
                works = named(OPERATIONS, "set_state", "get_state", "step")
                few = max(2, self.scale.operations // 2)
                turns = [
                    Turn(
                        Cell("network", work.name, f"{delay * 1000:.0f} ms"),
                        work,
                        1,
                        few,
                        suits=lambda name, work=work: (  # type: ignore[misc]
                            name != ROUND_TRIP or work.name != "step"
                        ),
                    )
                    for work in works
                ]
                await self._rounds(opened, turns)

    def behind_proxies(self, stack: AsyncExitStack, delay: float) -> Servers:
        """Return the servers with a network before them that takes its time."""
        return {
            name: stack.enter_context(proxy(url, delay)).in_front_of(url)
            for name, url in self.servers.items()
            if url.get_backend_name() in ("postgresql", "mysql", "redis")
        }

    async def trips(self) -> None:
        """Count statements and round trips of each operation."""
        for server in ("postgresql", "mysql", "redis"):
            if not (measured := self.compared(server)):
                continue
            with proxy(self.servers[server]) as between:
                servers = {server: between.in_front_of(self.servers[server])}
                async with AsyncExitStack() as stack:
                    opened = await self.open(stack, measured, servers, "_trips")
                    for name, storage in opened.items():
                        self.advance(f"round trips: {name}")
                        for work in OPERATIONS:
                            if work.suits(storage):
                                trips = await counted(between.counts, storage, work)
                                self.results.trips[name][work.name] = trips

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
        turns: list[Turn[BaseStorage]] = []
        measured = [
            each for each in self.compared("postgresql", "sqlite") if each.is_ours or each.is_bare
        ]
        async with AsyncExitStack() as stack:
            for rows in self.scale.rows:
                suffix = f"_{rows}"
                some = await self.open(stack, measured, suffix=suffix, rows=rows)
                opened.update({f"{name}/{rows}": storage for name, storage in some.items()})
                keys = [conversation(choose.randint(1, rows)) for _ in range(997)]
                turns += [
                    Turn(
                        Cell("rows", work.name, f"{rows:,}"),
                        work,
                        1,
                        self.scale.operations,
                        lambda number, keys=keys: keys[number % len(keys)],  # type: ignore[misc]
                        lambda name, rows=rows: name.endswith(f"/{rows}"),  # type: ignore[misc]
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
            opened = await self.open(stack, measured, suffix="_data")
            await self._rounds(opened, turns)

    async def _all(self) -> Opened:
        if not self._opened:
            self._opened = await self.open(self.stack, self.compared())
        return self._opened

    async def open(
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
            name = "".join(filter(str.isalnum, contender.name))[:28]  # of 63 bytes in all
            table = f"benchmark_{os.getpid()}_{name}{suffix}"
            storage = await stack.enter_async_context(contender.open(url, table))
            if rows:
                add_rows(url, table, rows)
            try:
                await asyncio.wait_for(fill(storage, conversation(1)), TIMEOUT)
            except Exception as error:
                failed = self.results.cells[Cell("opening", "fill", "1")][contender.name]
                failed.failure = in_short(error)
                continue
            opened[contender.name] = storage
        return opened

    async def _rounds(
        self, opened: Opened, turns: list[Turn[BaseStorage]], rounds: int | None = None
    ) -> None:
        await take_turns(self.results, opened, turns, rounds or self.scale.rounds, self.advance)


async def _repeat(
    act: Act[BaseStorage], storage: BaseStorage, keys: list[StorageKey], times: int
) -> None:
    for number in range(times):
        await act(storage, keys[number % len(keys)])
