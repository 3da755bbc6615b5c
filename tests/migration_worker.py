"""Processes that migrate, or serve users meanwhile: see ``test_migration_from_redis.py``."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Timer
from typing import Any

from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from aiogram.fsm.storage.redis import RedisStorage
from backends import REDIS_URL, Backend
from blocking import sqlite_without_fsync
from former import FULL
from sqlalchemy import URL, Engine

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage.migration import RedisSource, Report, migrate


@dataclass(frozen=True)
class Job:
    """What to move where."""

    backend: Backend
    url: URL
    table: str
    prefix: str
    """That of the keys in Redis."""
    batch: int = 5
    keys: Sequence[StorageKey] = ()
    """The users to serve."""
    dies_after: float | None = None
    """How many seconds after its first batches a migration is killed, None for never."""


def main(job: Job, told: Connection, what: str) -> None:
    """Migrate or serve users, and tell how far it is."""
    warnings.simplefilter("error")
    with sqlite_without_fsync():
        asyncio.run(carry_out(job, told, what))


async def carry_out(job: Job, told: Connection, what: str) -> None:
    """Do so."""
    engine = job.backend.engine(job.url)
    builder = DefaultKeyBuilder(prefix=job.prefix, **FULL)
    old = RedisStorage.from_url(REDIS_URL, key_builder=builder)
    storage = SQLAlchemyStorage(
        job.backend.factory(engine),
        table_name=job.table,
        fallback=old if what == "serve" else None,
    )
    if what == "serve":
        await serve(storage, job.keys, told)
    else:
        await move(storage, old, job, told)
    await old.close()
    if isinstance(engine, Engine):
        engine.dispose()
    else:
        await engine.dispose()


async def move(storage: SQLAlchemyStorage, old: RedisStorage, job: Job, told: Connection) -> None:
    """Migrate; send the report after each batch, and at last once more."""

    dying: list[Timer] = []

    def tell(report: Report) -> None:
        told.send(report)
        if job.dies_after is not None and report.found >= 25 and not dying:
            dying.append(Timer(job.dies_after, os.kill, [os.getpid(), signal.SIGKILL]))
            dying[0].start()
        time.sleep(0.005)  # so that there is time for it

    report = await migrate(RedisSource(old), storage, batch=job.batch, on_progress=tell)
    told.send(report)


async def serve(storage: SQLAlchemyStorage, keys: Sequence[StorageKey], told: Connection) -> None:
    """Have all users go on at once, for as long as the process lives."""
    steps = Steps(storage)
    await asyncio.gather(*(_served(steps, key, told) for key in keys))


async def _served(steps: Steps, key: StorageKey, told: Connection) -> None:
    chance = random.Random()
    await asyncio.sleep(chance.random() * 0.5)
    while True:
        async with steps.update(key):
            found = await steps.find(key)
            told.send(("found", key, found))
            wanted = {} if chance.random() < 0.3 else {**found, "step": found.get("step", 0) + 1}
            told.send(("wants", key, wanted))
            await steps.go_on(key, wanted)
        told.send(("has", key, wanted))
        await asyncio.sleep(chance.random() * 0.1)


class Steps:
    """What a bot does to conversations: by single calls, by units of work, and in transactions."""

    def __init__(self, storage: SQLAlchemyStorage) -> None:
        """Take a storage that falls back to another."""
        self._storage = storage
        self._isolation = storage.create_isolation(unit_of_work=True, lease=None)

    def update(self, key: StorageKey) -> AbstractAsyncContextManager[object]:
        """Return what an update of a user is in: a third of them each."""
        ways: list[Callable[[], AbstractAsyncContextManager[object]]] = [
            lambda: nullcontext(),
            lambda: self._isolation.lock(key),
            lambda: self._storage.transaction(),
        ]
        return ways[key.user_id % len(ways)]()

    async def find(self, key: StorageKey) -> dict[str, Any]:
        """Return the data; the state goes with them."""
        state, found = await self._storage.get_state(key), await self._storage.get_data(key)
        # A process may have been killed between two single calls.
        assert key.user_id % 3 == 0 or state == ("Form:step" if found else None)
        return found

    async def go_on(self, key: StorageKey, wanted: dict[str, Any]) -> None:
        """Make one step, or begin anew without data."""
        if wanted:
            await self._storage.update_data(key, {"step": wanted["step"]})
            await self._storage.set_state(key, "Form:step")
        else:
            await self._storage.clear(key)
