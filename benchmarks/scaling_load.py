"""Processes that do updates, each as a bot's would, and what they cost them and the server."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from aiogram.fsm.storage.base import BaseEventIsolation
from aiogram.fsm.storage.memory import DisabledEventIsolation
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from hybrid_storage import SQLAlchemyStorage

from .bots import Bots, talk_to_step_bot
from .scaling_server import Server, Tables, memory_of
from .turns import share
from .work import conversation

LEASE = "unit of work, lease"
PLAIN = "no isolation"
POOL = 2
"""Connections of a process."""
TASKS = 4
"""Users that a process serves at a time."""
TICK = 0.01
"""Seconds: the system counts the CPU time of other processes in these. Less is counted as one."""

# Forked from a process that has imported what takes long, and has no threads.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["benchmarks.scaling_load", "asyncpg"])


@dataclass(frozen=True)
class Job:
    """What a process has to do."""

    url: URL
    tables: Tables
    rows: int
    """How many conversations to choose from."""
    updates: int
    isolation: str = LEASE
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """What updates have cost."""

    updates: int
    """The measured ones."""
    all_updates: int
    """Those to warm up included."""
    seconds: float
    client_cpu: float
    server_cpu: float
    """In seconds for an update."""
    wal: float
    """In bytes for an update."""
    connections: int
    memory: float
    """Of a connection's process, in bytes."""


def measured(server: Server, job: Job, processes: int = 1) -> Cost:
    """Have processes share the updates of a job, and return what they cost."""
    each = max(TASKS, job.updates // processes)
    ends: list[Connection] = []
    running = []
    others = len(server.backends())
    for number in range(processes):
        mine, theirs = _FORKED.Pipe()
        shared = replace(job, updates=each, seed=job.seed + number)
        process = _FORKED.Process(target=_work, args=(shared, theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append(mine)
        running.append(process)
    try:
        warm = sum(_hear(ends))
        cpu, wal, began = server.cpu(), server.log_position(), time.perf_counter()
        _tell(ends)
        client = sum(_hear(ends))
        seconds = time.perf_counter() - began
        cpu, wal = max(server.cpu() - cpu, TICK), server.log_position() - wal
        backends = server.backends()
        memory = memory_of(backends)
        _tell(ends)
        for process in running:
            process.join(30)
    finally:
        for process in running:
            process.kill()
    updates = each * processes
    return Cost(
        updates,
        updates + int(warm),
        seconds / updates,
        client / updates,
        cpu / updates,
        wal / updates,
        len(backends) - others,
        memory,
    )


def _hear(ends: Iterable[Connection]) -> list[float]:
    return [end.recv() for end in ends]


def _tell(ends: Iterable[Connection]) -> None:
    for end in ends:
        end.send("go on")


def _work(job: Job, parent: Connection) -> None:
    asyncio.run(_updates(job, parent))
    parent.close()
    os._exit(0)  # nothing is left to do, and 64 garbage collections take long


async def _updates(job: Job, parent: Connection) -> None:
    options: dict[str, Any] = {"pool_size": POOL, "max_overflow": 0, "pool_timeout": 60}
    engine = create_async_engine(job.url.set(drivername="postgresql+asyncpg"), **options)
    storage = SQLAlchemyStorage(
        async_sessionmaker(engine), table_name=job.tables.name, columns=job.tables.columns
    )
    isolation: BaseEventIsolation = DisabledEventIsolation()
    if job.isolation == LEASE:
        isolation = storage.create_isolation(unit_of_work=True)
    bots = Bots(storage, isolation)
    choose = random.Random(job.seed)
    keys = [conversation(choose.randint(1, job.rows)) for _ in range(job.updates)]
    warm = keys[: 4 * TASKS]  # until all connections are there, and statements prepared
    await share(talk_to_step_bot, bots, warm, TASKS)
    parent.send(len(warm))
    parent.recv()  # nothing else is to run meanwhile
    cpu = time.process_time()
    await share(talk_to_step_bot, bots, keys, TASKS)
    parent.send(time.process_time() - cpu)
    parent.recv()
    await isolation.close()
    await engine.dispose()
