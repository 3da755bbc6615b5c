"""What the processes of ``test_unit_processes.py`` do: update, write beside, hold, poll.

Each leaves a journal that tells what it was told had been written.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import Message
from backends import Backend
from bot_api import TOKEN
from isolation_worker import dispose, forego_the_disk
from sqlalchemy import URL, Column, Integer, MetaData, Table, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, sessionmaker

from hybrid_storage import (
    FlushMiddleware,
    LockLostError,
    SQLAlchemyEventIsolation,
    SQLAlchemyStorage,
)

KEYS = [StorageKey(bot_id=42, chat_id=user, user_id=user) for user in range(5)]


@dataclass(frozen=True)
class Job:
    """What a process has to do."""

    backend: Backend
    url: URL
    table: str
    folder: Path
    """Where the journal is: one for all processes."""
    tasks: int = 2
    updates: int = 20
    """How many updates each task is to handle."""
    lease: float | None = 30.0
    isolation_level: str | None = None

    def note(self, kind: str, value: object) -> None:
        """Write down that something has happened."""
        with (self.folder / "journal").open("a") as journal:
            journal.write(json.dumps([kind, value]) + "\n")

    def noted(self, kind: str) -> list[Any]:
        """Return what all processes wrote down about one kind of event."""
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [value for each, value in map(json.loads, lines) if each == kind]

    def say(self, word: str) -> None:
        """Tell all processes something."""
        (self.folder / word).touch()

    def is_said(self, word: str) -> bool:
        """Tell whether it has been said."""
        return (self.folder / word).exists()

    async def hears(self, word: str) -> None:
        """Wait until it is said."""
        while True:
            if self.is_said(word):
                return
            await anyio.sleep(0.01)

    def engine(self) -> Any:
        """Return an engine."""
        level = {"isolation_level": self.isolation_level} if self.isolation_level else {}
        engine = self.backend.engine(self.url, **level)
        forego_the_disk(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)
        return engine

    def storage(self, engine: Any) -> tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation]:
        """Return a storage, and isolation with a unit of work."""
        storage: SQLAlchemyStorage = SQLAlchemyStorage(
            self.backend.factory(engine), table_name=self.table
        )
        isolation = storage.create_isolation(
            unit_of_work=True,
            lease=self.lease,
            poll=0.05,
            driver_statements=self.backend.driver_statements,
        )
        return storage, isolation


def counters(table: str) -> Table:
    """Return a table of the application's: a number for each user."""
    return Table(
        f"{table}_app",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("n", Integer, nullable=False),
    )


def count_up(session: Session, table: Table, key: StorageKey) -> None:
    """Read a number of the application's, and write one more: wrong unless it is done alone."""
    n = session.execute(select(table.c.n).where(table.c.id == key.user_id)).scalar_one()
    session.execute(update(table).where(table.c.id == key.user_id).values(n=n + 1))


def is_serialization_failure(error: DBAPIError) -> bool:
    """Tell whether the transaction is to be begun anew."""
    number = next(iter(getattr(error.orig, "args", ())), None)
    return getattr(error.orig, "sqlstate", None) == "40001" or number == 1020  # MariaDB 11.6


class Updates(logging.Handler):
    """Handles updates as several bots on the same conversations would.

    :param job: what to do
    """

    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self._job = job
        self._app = counters(job.table)

    def emit(self, record: logging.LogRecord) -> None:
        """Write down what the package logs."""
        self._job.note("warning", record.getMessage())

    async def run(self) -> None:
        """Do the job."""
        logging.getLogger("hybrid_storage").addHandler(self)
        engine = self._job.engine()
        self._storage, self._isolation = self._job.storage(engine)
        async with anyio.create_task_group() as group:
            for _ in range(self._job.tasks):
                group.start_soon(self._handle_updates)
        await dispose(engine)

    async def _handle_updates(self) -> None:
        for _ in range(self._job.updates):
            key = random.choice(KEYS)
            while True:
                try:
                    await self._handle(key)
                    break
                except DBAPIError as error:  # what an application does at such isolation levels
                    if not is_serialization_failure(error):
                        raise
                    self._job.note("serialization", key.user_id)
            self._job.note("done", key.user_id)

    async def _handle(self, key: StorageKey) -> None:
        storage = self._storage
        async with self._isolation.lock(key):
            with self._alone(key):
                data = await storage.get_data(key)
                await anyio.sleep(random.uniform(0, 0.004))
                async with storage.transaction():
                    await storage.update_data(key, {"count": data.get("count", 0) + 1})
                    await storage.run_sync(count_up, self._app, key)
                # Written when the lock is left.
                await storage.update_data(key, {"after": data.get("after", 0) + 1})

    @contextmanager
    def _alone(self, key: StorageKey) -> Iterator[None]:
        """Leave a trace while inside, and look for that of others."""
        trace = self._job.folder / f"{key.user_id}.inside"
        try:
            trace.symlink_to(str(os.getpid()))
        except FileExistsError:
            pid = int(os.readlink(trace))
            if is_alive(pid):
                self._job.note("overlap", [key.user_id, pid, os.getpid()])
            trace.unlink()
            trace.symlink_to(str(os.getpid()))
        try:
            yield
        finally:
            trace.unlink()


def is_alive(pid: int) -> bool:
    """Tell whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def handle_updates(job: Job) -> None:
    """Increment the counters of conversations, each under its lock."""
    asyncio.run(Updates(job).run())


def write_beside(job: Job) -> None:
    """Set other fields of the same rows, by synchronous code without a lock, until told to stop."""
    engine = job.engine()
    factory = sessionmaker(engine)
    storage = SQLAlchemyStorage(factory, table_name=job.table)
    number = 0
    while not job.is_said("stop"):
        for key in KEYS:
            while True:
                try:
                    with factory.begin() as session:
                        storage.operations.update_data(session, key, {f"field{number}": number})
                    break
                except DBAPIError as error:
                    if not is_serialization_failure(error):
                        raise
        number += 1
        job.note("fields", number)
        time.sleep(0.01)
    engine.dispose()


def hold(job: Job, ends_by: str) -> None:
    """Hold the lock of a conversation until told to go on, and then write."""
    asyncio.run(_hold(job, ends_by))


async def _hold(job: Job, ends_by: str) -> None:
    engine = job.engine()
    storage, isolation = job.storage(engine)
    try:
        async with isolation.lock(KEYS[0]):
            count = (await storage.get_data(KEYS[0])).get("count", 0)
            await storage.update_data(KEYS[0], {"count": count + 1, "by": "holder"})
            await storage.set_state(KEYS[0], "held")
            job.say("held")
            await job.hears("go on")
            if ends_by == "flush":
                await storage.flush()
            elif ends_by == "transaction":
                async with storage.transaction():
                    await storage.run_sync(count_up, counters(job.table), KEYS[0])
    except LockLostError as error:
        job.note("lost", str(error))
    else:
        job.note("done", KEYS[0].user_id)
    await dispose(engine)


def poll(job: Job, api: str, flushes: bool) -> None:
    """Run a bot that counts messages, and answers with the count."""
    asyncio.run(_poll(job, api, flushes))


async def _poll(job: Job, api: str, flushes: bool) -> None:
    storage, isolation = job.storage(job.engine())
    dp = Dispatcher(storage=storage, events_isolation=isolation)
    bot = Bot(TOKEN, session=AiohttpSession(api=TelegramAPIServer.from_base(api)))
    if flushes:
        bot.session.middleware(FlushMiddleware(storage))

    @dp.message()
    async def count(message: Message, state: FSMContext) -> None:
        number = (await state.get_data()).get("count", 0) + 1
        await state.update_data(count=number)
        await state.set_state(f"counted {number}")
        await message.answer(str(number))

    await dp.start_polling(bot, handle_signals=False)
