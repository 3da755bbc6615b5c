"""Many calls at once: none runs into a time-out, and nobody starves anybody."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from backends import SERVERS, Backend
from conftest import Open, engine_of, new_session, rows
from sqlalchemy import select, text

from hybrid_storage import SQLAlchemyStorage

IMPATIENT = 1.0  # seconds that a call may wait in the pool
CONVERSATIONS = 40


def key_of(n: int) -> StorageKey:
    return StorageKey(bot_id=1, chat_id=n, user_id=n)


@pytest.mark.parametrize("backend", SERVERS, ids=str)
@pytest.mark.parametrize("size", [None, 1], ids=["default pool", "pool of one"])
async def test_hundreds_of_calls_at_once(
    backend: Backend, size: int | None, open_storage: Open
) -> None:
    options = {} if size is None else {"pool_size": size, "max_overflow": 0}
    storage: SQLAlchemyStorage = await open_storage(
        backend, engine_options={"pool_timeout": IMPATIENT, **options}, retry_for=0
    )
    fields = ["a", "b", "c", "d"]
    async with anyio.create_task_group() as calls:
        for n in range(CONVERSATIONS):
            for field in fields:
                calls.start_soon(storage.update_data, key_of(n), {field: n})
                calls.start_soon(storage.get_state, key_of(n))
            calls.start_soon(storage.set_state, key_of(n), f"state {n}")
            calls.start_soon(storage.get_data, key_of(n))
    for n in (0, CONVERSATIONS - 1):
        assert await storage.get_data(key_of(n)) == dict.fromkeys(fields, n)
        assert await storage.get_state(key_of(n)) == f"state {n}"
    assert len(await rows(storage)) == CONVERSATIONS


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_handlers_that_hold_all_connections_are_served(
    backend: Backend, open_storage: Open
) -> None:
    """Each holds a connection of its own while it calls the storage, and reads only."""
    size = 5
    storage: SQLAlchemyStorage = await open_storage(
        backend,
        engine_options={"pool_timeout": IMPATIENT, "pool_size": size, "max_overflow": 0},
        retry_for=0,
    )
    holding = anyio.Semaphore(size)

    async def handler(n: int) -> None:
        async with holding, AsyncExitStack() as stack:
            session = new_session(storage)
            stack.push_async_callback(on_its_way, session.close)
            assert await on_its_way(session.scalar, select(text("42"))) == 42
            await storage.update_data(key_of(n), {"n": n})
            await storage.set_state(key_of(n), "served")

    async def on_its_way(function: Any, *args: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        return await to_thread.run_sync(function, *args)

    async with anyio.create_task_group() as handlers:
        for n in range(6 * size):
            handlers.start_soon(handler, n)
    assert {row[1] for row in await rows(storage)} == {"served"}
    assert len(await rows(storage)) == 6 * size


async def test_the_application_gets_its_threads_while_ours_are_all_busy(
    open_storage: Open,
) -> None:
    size = 50  # more than anyio lends by default
    storage: SQLAlchemyStorage = await open_storage(
        SERVERS[2], engine_options={"pool_size": size, "max_overflow": 0}
    )
    assert SERVERS[2].name == "psycopg"
    pool: Any = engine_of(storage).pool
    with new_session(storage) as locking:
        storage.operations.set_state(locking, key_of(0), "locked")
        waiting = [asyncio.ensure_future(storage.set_state(key_of(0), str(n))) for n in range(size)]
        # One of the connections is ours; the last call waits for that.
        while pool.checkedout() < size:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with anyio.fail_after(30):
            assert await to_thread.run_sync(lambda: "a thread") == "a thread"
        assert not any(each.done() for each in waiting)
        locking.rollback()
    await asyncio.gather(*waiting)
    assert await storage.get_state(key_of(0)) in {str(n) for n in range(size)}
