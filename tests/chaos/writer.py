"""A process that writes ever higher numbers, and notes which of them were acknowledged."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anyio
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage

from .journal import Journal
from .updater import Updater

CONVERSATIONS = 4  # that all processes write to
CLIENTS = 4  # of a process, that write at once
UPDATERS = 2  # of a process, that handle updates beside
FIELDS = 3  # of a client in each conversation, written in turn
TWIN = "twin of "  # a second field that is always written together with the first
STATE = "state"
_PATIENCE = 10  # seconds for threads to end

Call = Callable[[], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Job:
    """What a process is to do."""

    name: str
    url: str
    table: str
    journal: Path
    cancels: bool = False
    """Whether to cancel calls at random moments."""
    first: int = 1
    """The first number to write."""
    lease: float | None = None
    """Of the locks under which to handle updates beside; None for no updates."""
    pause: float = 0.0
    """Seconds between two writes of a client."""
    options: dict[str, Any] = field(default_factory=dict)
    """The engine's options."""


class Client:
    """Writes fields of its own into shared conversations, and the state of one of its own."""

    def __init__(self, name: str, storage: SQLAlchemyStorage, journal: Journal, job: Job) -> None:
        self._name = name
        self._storage = storage
        self._journal = journal
        self._cancels = job.cancels
        self._number = job.first - 1
        self._acknowledged: dict[tuple[str, str], int] = {}

    async def write(self) -> None:
        """Write the next number, as data and as a state, and compare what can be read then."""
        self._number += 1
        turn, conversation = divmod(self._number, CONVERSATIONS)
        shared = StorageKey(bot_id=1, chat_id=conversation, user_id=conversation)
        name = f"{self._name}.{turn % FIELDS}"
        changes = {name: self._number, TWIN + name: self._number}
        await self._do(shared, name, lambda: self._storage.update_data(shared, changes))
        own = StorageKey(bot_id=1, chat_id=0, user_id=0, destiny=self._name)
        await self._do(own, STATE, lambda: self._storage.set_state(own, str(self._number)))

        data = await self._storage.get_data(shared)
        for mine in (f"{self._name}.{n}" for n in range(FIELDS)):
            self._compare(shared, mine, data.get(mine, 0), data.get(TWIN + mine, 0))
        state = int(await self._storage.get_state(own) or 0)
        self._compare(own, STATE, state, state)

    async def _do(self, key: StorageKey, name: str, call: Call) -> None:
        register = FullKeyBuilder().build(key), name
        self._journal.note("try", *register, self._number)
        began = time.monotonic()
        if self._cancels and random.random() < 0.5:
            done = await random.choice(CUTS)(call)
        else:
            await call()
            done = True
        if done:
            self._acknowledged[register] = self._number
            self._journal.note("ack", *register, self._number, time.monotonic() - began)
        else:
            self._journal.note("cut", time.monotonic() - began)

    def _compare(self, key: StorageKey, name: str, value: int, twin: int) -> None:
        register = FullKeyBuilder().build(key), name
        if value != twin:
            self._journal.note("half", *register, value, twin)
        if value < (acknowledged := self._acknowledged.get(register, 0)):
            self._journal.note("stale", *register, value, acknowledged)


async def cut_by_its_task(call: Call) -> bool:
    """Cancel a call's task.

    :return: whether the call was done all the same
    """
    return await _cut(call, times=1)


async def cut_twice(call: Call) -> bool:
    """Cancel a call's task, and again while it is still busy with the first time."""
    return await _cut(call, times=2)


async def _cut(call: Call, times: int) -> bool:
    task = asyncio.ensure_future(call())
    for _ in range(times):
        await asyncio.sleep(_moment())
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


async def cut_by_a_timeout(call: Call) -> bool:
    """Let a call run out of time."""
    try:
        await asyncio.wait_for(call(), _moment())
    except asyncio.TimeoutError:
        return False
    return True


async def cut_by_a_scope(call: Call) -> bool:
    """Cancel a call by the scope that it runs in."""
    with anyio.move_on_after(_moment()):
        await call()
        return True
    return False


CUTS: list[Callable[[Call], Awaitable[bool]]] = [
    cut_by_its_task,
    cut_twice,
    cut_by_a_timeout,
    cut_by_a_scope,
]


def _moment() -> float:
    """Return some seconds, about as many as a call takes."""
    return random.expovariate(200)


def work(job: Job, orders: Connection) -> None:
    """Write until the other end of ``orders`` is closed. The process's main function."""
    logging.getLogger().addHandler(logging.NullHandler())  # SQLAlchemy logs what it throws away
    journal = Journal(job.journal)
    logging.getLogger("hybrid_storage").addHandler(journal)
    left = anyio.run(_work, job, journal, orders)
    others = [
        thread for thread in threading.enumerate() if thread is not threading.current_thread()
    ]
    for thread in others:
        thread.join(_PATIENCE)
    journal.note("end", left, [thread.name for thread in others if thread.is_alive()])


async def _work(job: Job, journal: Journal, orders: Connection) -> int:
    storage = SQLAlchemyStorage.from_url(job.url, table_name=job.table, **job.options)
    clients: list[Client | Updater] = [
        Client(f"{job.name}.{n}", storage, journal, job) for n in range(CLIENTS)
    ]
    if job.lease is not None:
        isolation = storage.create_isolation(unit_of_work=True, lease=job.lease, poll=0.05)
        clients += [Updater(storage, isolation, journal) for _ in range(UPDATERS)]
    await storage.create_table()
    async with anyio.create_task_group() as tasks:
        told = asyncio.ensure_future(to_thread.run_sync(orders.poll, None, abandon_on_cancel=True))
        for client in clients:
            tasks.start_soon(_go_on, client, journal, told, job.pause)
    pool: Any = await storage.run_sync(lambda session: session.get_bind(storage.model).engine.pool)
    left: int = pool.checkedout()
    await storage.close()
    return left


async def _go_on(
    client: Client | Updater, journal: Journal, told: asyncio.Future[bool], pause: float
) -> None:
    while not told.done():
        try:
            await client.write()
            if pause:
                await asyncio.sleep(pause)
        except Exception as error:
            journal.note("error", repr(error))
            await asyncio.sleep(0.1)
