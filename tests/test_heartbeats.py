"""Leases are renewed however many calls wait, and whatever the application does with the pool."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
from conftest import Open, engine_of
from sqlalchemy.ext.asyncio import AsyncEngine

from hybrid_storage import SQLAlchemyStorage

LEASE = 3.0  # seconds
HELD_FOR = 1.5 * LEASE
WAITING = 6000  # calls, which take longer than a lease one after another


def lost(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


# Calls queue in front of threads, or of connections: the drivers make no difference to that.
@pytest.mark.parametrize(
    "backend", [SQLITE[0], POSTGRESQL[0], POSTGRESQL[2], *MARIADB[1:]], ids=str
)
async def test_a_lock_is_kept_while_thousands_of_calls_wait(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend, slow_after=60)
    isolation = storage.create_isolation(lease=LEASE)
    await storage.create_table()
    ends = time.monotonic() + HELD_FOR

    async def write(number: int) -> None:
        while time.monotonic() < ends:
            await storage.set_state(replace(key, user_id=number), "busy")

    async with isolation.lock(key):
        writers = set()
        for number in range(WAITING):
            writers.add(asyncio.create_task(write(number)))
            if number % 200 == 0:  # the event loop is not to stand still meanwhile
                await asyncio.sleep(0.01)
        while time.monotonic() < ends:
            assert isolation.still_held(key)
            await asyncio.sleep(0.1)
        for each in writers:
            each.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
    assert lost(caplog) == []
    await storage.run_sync(lambda session: isolation_table(storage, session))


def isolation_table(storage: SQLAlchemyStorage, session: object) -> None:
    """Leave no table of locks behind."""
    from sqlalchemy.orm import Session

    assert isinstance(session, Session)
    name = f"{storage.table.name}_lock"
    storage.metadata.tables[name].drop(session.connection())


async def test_a_lock_is_kept_while_the_application_holds_all_connections(
    open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    """On all backends at once, since it takes its time."""
    async with anyio.create_task_group() as tasks:
        for backend in SERVERS:
            storage = await open_storage(
                backend, engine_options={"pool_size": 2, "max_overflow": 0}
            )
            tasks.start_soon(keep_a_lock_while_all_connections_are_held, backend, storage, key)
    assert lost(caplog) == []


async def keep_a_lock_while_all_connections_are_held(
    backend: Backend, storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    isolation = storage.create_isolation(lease=LEASE)
    await storage.create_table()
    engine = engine_of(storage)
    async with isolation.lock(key), AsyncExitStack() as held:
        for _ in range(2):
            if backend.is_async:
                await held.enter_async_context(AsyncEngine(engine).connect())
            else:
                held.enter_context(engine.connect())
        assert getattr(engine.pool, "checkedout")() == 2  # noqa: B009
        ends = time.monotonic() + HELD_FOR
        while time.monotonic() < ends:
            assert isolation.still_held(key)
            await asyncio.sleep(0.1)
    await storage.run_sync(lambda session: isolation_table(storage, session))
