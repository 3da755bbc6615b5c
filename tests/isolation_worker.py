"""A process that works under locks, and leaves traces that tell whether it was alone.

``test_isolation_processes.py`` starts several of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from aiogram.fsm.storage.base import StorageKey
from backends import Backend
from sqlalchemy import URL, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

KEYS = [StorageKey(bot_id=42, chat_id=user, user_id=user) for user in range(5)]


@dataclass(frozen=True)
class Job:
    """What a process has to do."""

    backend: Backend
    url: URL
    table: str
    folder: Path
    """Where the traces go: one folder for all processes."""
    tasks: int
    sections: int
    """How many critical sections each task is to go through."""
    lease: float
    dies_in: int | None = None
    """In which of its sections the process kills itself."""


def count_file(folder: Path, key: StorageKey) -> Path:
    """Return the file in which the sections of a key are counted."""
    return folder / f"{key.user_id}.count"


def events(folder: Path, kind: str) -> list[Any]:
    """Return what all processes wrote down about one kind of event."""
    lines = (folder / "journal").read_text().splitlines()
    return [value for each, value in map(json.loads, lines) if each == kind]


def work(job: Job) -> None:
    """Do a job, in a process of its own."""
    asyncio.run(Worker(job).run())


class Worker(logging.Handler):
    """Goes through critical sections, and tells when it was not alone in one.

    :param job: what to do
    """

    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self._job = job
        self._begun = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write down what the package logs."""
        self._note("warning", record.getMessage())

    async def run(self) -> None:
        """Do the job."""
        job = self._job
        logging.getLogger("hybrid_storage").addHandler(self)
        engine = job.backend.engine(job.url)
        storage: SQLAlchemyStorage = SQLAlchemyStorage(
            job.backend.factory(engine), table_name=job.table
        )
        forego_the_disk(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)
        isolation = storage.create_isolation(lease=job.lease)
        async with anyio.create_task_group() as group:
            for _ in range(job.tasks):
                group.start_soon(self._go_through_sections, storage, isolation)
        await dispose(engine)

    async def _go_through_sections(
        self, storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation
    ) -> None:
        for _ in range(self._job.sections):
            key = random.choice(KEYS)
            asked = time.monotonic()
            async with isolation.lock(key):
                with self._alone(key, asked):
                    await self._count(storage, key)
            self._note("section", time.monotonic() - asked)

    @contextmanager
    def _alone(self, key: StorageKey, asked: float) -> Iterator[None]:
        """Leave a trace while inside, and look for that of others."""
        trace = self._job.folder / f"{key.user_id}.inside"
        mine = json.dumps([os.getpid(), asked])
        try:
            trace.symlink_to(mine)  # fails if it is there: like O_EXCL, but never without content
        except FileExistsError:
            entered = time.monotonic()
            pid, since = json.loads(os.readlink(trace))
            ends = since + self._job.lease  # at the earliest: it may have been renewed
            # SQLite's clock counts milliseconds.
            if not self._epitaph(pid).exists() or entered < ends - 0.002:
                self._note("overlap", [key.user_id, pid, os.getpid(), entered - since])
            else:
                self._note("takeover", entered - max(asked, ends))
            trace.unlink()
            trace.symlink_to(mine)
        yield
        trace.unlink()

    async def _count(self, storage: SQLAlchemyStorage, key: StorageKey) -> None:
        self._begun += 1
        dies = self._begun == self._job.dies_in
        in_database = await storage.get_value(key, "count", 0)
        file = count_file(self._job.folder, key)
        in_file = int(file.read_text()) if file.exists() else 0
        await anyio.sleep(random.uniform(0, 0.004))
        if dies:
            self._epitaph(os.getpid()).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write_text(str(in_file + 1))
        await storage.set_data(key, {"count": in_database + 1})

    def _epitaph(self, pid: int) -> Path:
        return self._job.folder / f"{pid}.dead"

    def _note(self, kind: str, value: object) -> None:
        with (self._job.folder / "journal").open("a") as journal:
            journal.write(json.dumps([kind, value]) + "\n")


def forego_the_disk(engine: Engine) -> None:
    """Let SQLite commit without waiting for the disk, which takes longer than all the rest.

    That is for those who pull the plug. A process that is killed loses nothing by it.
    """
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "checkout")
        def forego(connection: Any, *_: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA synchronous = OFF")
            cursor.close()


async def dispose(engine: Any) -> None:
    """Dispose an engine of either kind."""
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()
