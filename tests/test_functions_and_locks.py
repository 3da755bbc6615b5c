"""What a failing commit must not hide, and what synchronous code must not wait for."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import TelegramObject
from backends import POSTGRESQL, SQLITE, Backend
from conftest import Open, engine_of
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from hybrid_storage import SessionMiddleware, SQLAlchemyStorage, isolation

EACH_SERVER = pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[0]], ids=str)
ON_SQLITE = pytest.mark.parametrize("backend", SQLITE[:1], ids=str)


@EACH_SERVER
async def test_a_commit_that_fails_leaves_error_handlers_a_session_that_says_so(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    data: dict[str, Any] = {}

    async def handler(event: TelegramObject, data: dict[str, Any]) -> None:
        model: Any = storage.model
        data["session"].add_all([model(id="twice"), model(id="twice")])

    with pytest.raises(Exception, match=r"(?i)unique|conflict|identity|duplicate"):
        await SessionMiddleware(storage)(handler, TelegramObject(), data)
    with pytest.raises(InvalidRequestError, match="rolled back"):
        data["session"].get(storage.model, "twice")


@EACH_SERVER
async def test_synchronous_code_does_not_wait_for_the_handler_that_calls_it(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    isolation = storage.create_isolation(unit_of_work=True)
    await storage.create_table()

    def locks() -> bool:
        with isolation.lock_sync(key):
            held: bool = isolation.still_held(key)
        assert not isolation.still_held(key)
        return held

    async with isolation.lock(key):
        with pytest.raises(RuntimeError, match="wait for its own handler"):
            await storage.run_sync(lambda session: locks())
    with pytest.raises(RuntimeError, match="blocks its thread"):
        locks()
    assert await asyncio.to_thread(locks)
    storage.metadata.drop_all(engine_of(storage))


@ON_SQLITE
async def test_synchronous_code_waits_for_a_busy_database_no_longer_than_for_the_lock(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"connect_args": {"timeout": 0.1}})
    impatient = storage.create_isolation(wait=0.5)
    await storage.create_table()

    def locks() -> float:
        began = time.monotonic()
        with pytest.raises(DBAPIError, match="locked"), impatient.lock_sync(key):
            pass
        return time.monotonic() - began

    engine = engine_of(storage)
    with closing(engine.connect()) as busy:
        busy.exec_driver_sql("BEGIN IMMEDIATE")
        assert await asyncio.to_thread(locks) < 5  # it would go on for 30 s
    storage.metadata.drop_all(engine)


@EACH_SERVER
async def test_a_missing_table_of_locks_is_one_error(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend)
    leased = storage.create_isolation()

    def locks() -> None:
        with leased.lock_sync(key):
            pass

    with pytest.raises(DBAPIError, match="create it with"):
        await asyncio.to_thread(locks)
    with pytest.raises(DBAPIError, match="create it with"):
        async with leased.lock(key):
            pass
    assert caplog.messages == []


@ON_SQLITE
async def test_two_kinds_of_isolation_are_warned_of(
    backend: Backend, open_storage: Open, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend)
    storage.create_isolation()
    storage.create_isolation(unit_of_work=True)
    assert caplog.messages == []
    storage.create_isolation(lease=None)
    assert "neither waits for the other" in caplog.text


@ON_SQLITE
async def test_a_lock_whose_holder_needs_the_file_is_not_waited_for_in_a_transaction(
    backend: Backend, open_storage: Open, key: StorageKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await open_storage(backend)
    leased = storage.create_isolation()
    await storage.create_table()
    monkeypatch.setattr(isolation, "PARENT_WAIT", 0.3)
    async with leased.lock(key):
        task = asyncio.create_task(_lock_in_transaction(storage, leased, key))
        with pytest.raises(RuntimeError, match="take the lock first"):
            await task
    storage.metadata.drop_all(engine_of(storage))


async def _lock_in_transaction(
    storage: SQLAlchemyStorage, leased: isolation.SQLAlchemyEventIsolation, key: StorageKey
) -> None:
    async with storage.transaction(), leased.lock(key):
        raise AssertionError("it is held")
