"""Drivers that synchronous applications have: what the storage promises on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import SERVERS, Backend, mysql_version
from blocking import locked
from conftest import Open, engine_of, every_call, rows
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyStorage

POSTGRESQL = [
    Backend("psycopg2", "postgresql", "psycopg2", is_async=False),
    Backend("pg8000", "postgresql", "pg8000", is_async=False),
]
MARIADB = [
    Backend("mysqlconnector", "mariadb", "mysqlconnector", is_async=False),
]
DRIVERS = [*POSTGRESQL, *(MARIADB if mysql_version() else [])]


Opened = Callable[[Backend], Awaitable[SQLAlchemyStorage]]


@pytest.fixture
def opened(open_storage: Open, url_of: Callable[[Backend], URL]) -> Opened:
    """Return a function that opens a storage; pg8000 is told the socket its own way."""

    async def opened(backend: Backend) -> SQLAlchemyStorage:
        options = {}
        folder = url_of(backend).query.get("host")
        if backend.driver == "pg8000" and isinstance(folder, str):
            options["connect_args"] = {"unix_sock": f"{folder}/.s.PGSQL.5432"}
        storage = await open_storage(backend, engine_options=options)
        assert isinstance(storage, SQLAlchemyStorage)
        return storage

    return opened


@pytest.mark.parametrize("backend", DRIVERS, ids=str)
async def test_every_call_works(backend: Backend, opened: Opened, key: StorageKey) -> None:
    await every_call(await opened(backend), key)


@pytest.mark.parametrize("backend", DRIVERS, ids=str)
async def test_no_concurrent_change_is_lost(
    backend: Backend, opened: Opened, key: StorageKey
) -> None:
    storage = await opened(backend)
    await asyncio.gather(*(storage.update_data(key, {str(n): n}) for n in range(30)))
    assert len(await storage.get_data(key)) == 30


@pytest.mark.parametrize("backend", DRIVERS, ids=str)
async def test_transactions_and_isolation_work(
    backend: Backend, opened: Opened, key: StorageKey
) -> None:
    storage = await opened(backend)
    isolation = storage.create_isolation()
    await storage.create_table()
    other = replace(key, user_id=8)
    with pytest.raises(ZeroDivisionError):
        async with isolation.lock(key), storage.transaction():
            await storage.set_state(key, "gone")
            async with storage.transaction():
                await storage.set_state(other, "gone")
            raise ZeroDivisionError
    assert (await storage.get_state(key), await storage.get_state(other)) == (None, None)
    lock = storage.metadata.tables[f"{storage.table.name}_lock"]
    await storage.run_sync(lambda session: lock.drop(session.connection()))


@pytest.mark.parametrize("fails", [False, True], ids=["commit", "rollback"])
@pytest.mark.parametrize("backend", [*SERVERS, *DRIVERS], ids=str)
async def test_functions_that_commit_do_not_split_a_transaction(
    backend: Backend, opened: Opened, key: StorageKey, fails: bool
) -> None:
    storage = await opened(backend)
    model: Any = storage.model

    def insert(session: Session, row: str) -> None:
        session.add(model(id=row))
        session.commit()
        session.add(model(id=f"{row}, undone"))
        session.flush()
        session.rollback()

    try:
        async with storage.transaction():
            await storage.run_sync(insert, "a")
            with pytest.raises(ZeroDivisionError):
                async with storage.transaction():
                    await storage.run_sync(insert, "nested")
                    raise ZeroDivisionError
            await storage.run_sync(insert, "b")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert [row[0] for row in await rows(storage)] == ([] if fails else ["a", "b"])


@pytest.mark.parametrize("backend", DRIVERS, ids=str)
async def test_a_missing_table_is_explained(
    backend: Backend, opened: Opened, key: StorageKey
) -> None:
    storage = await opened(backend)
    await storage.run_sync(lambda session: storage.table.drop(session.connection()))
    with pytest.raises(DBAPIError, match=r"create it with"):
        await storage.set_state(key, "waiting")


@pytest.mark.parametrize("backend", DRIVERS, ids=str)
async def test_a_wait_for_a_lock_that_times_out_is_tried_again(
    backend: Backend, opened: Opened, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    storage = await opened(backend)
    statement = {
        "postgresql": "SET lock_timeout = 100",
        "mariadb": "SET SESSION innodb_lock_wait_timeout = 1",
    }[backend.server]

    def be_impatient(connection: object, *_: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # type: ignore[attr-defined]

    await storage.set_state(key, "before")
    event.listen(engine_of(storage).pool, "checkout", be_impatient)
    with locked(backend, url_of(backend), storage, key) as lock:
        write = asyncio.create_task(storage.set_state(key, "after"))
        await asyncio.sleep(1.5)
        assert not write.done()
        lock.release()
    await write
    assert await storage.get_state(key) == "after"


@pytest.mark.parametrize("backend", [POSTGRESQL[0]], ids=str)
async def test_psycopg2_cancels_at_the_server(
    backend: Backend, opened: Opened, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    storage = await opened(backend)
    await storage.set_state(key, "before")
    with locked(backend, url_of(backend), storage, key) as lock:
        write = asyncio.create_task(storage.set_state(key, "after"))
        await lock.is_waited_for()
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(write, 5)
        lock.release()
    assert await storage.get_state(key) == "before"
