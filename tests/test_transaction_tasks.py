"""A transaction belongs to the task that opened it, whatever tasks are started inside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import CancelScope
from backends import MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import PATIENCE
from conftest import Open, new_session
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session
from units import outside

from hybrid_storage import SQLAlchemyStorage, transactions
from hybrid_storage._engine import scopes, slots

ROW_LOCKS = [*POSTGRESQL, *MARIADB]


@pytest.fixture
def other(key: StorageKey) -> StorageKey:
    """Return the key of another conversation."""
    return replace(key, user_id=8)


@pytest.fixture
def short_wait(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> float:
    """Wait for a parent for less than ten seconds; MariaDB counts whole ones."""
    seconds = 1.0 if backend.server == "mariadb" else 0.3
    for module in (slots, scopes, transactions):
        monkeypatch.setattr(module, "PARENT_WAIT", seconds)
    return seconds


@pytest.mark.parametrize("backend", ROW_LOCKS, ids=str)
async def test_a_childs_transaction_that_outlives_its_parents_is_committed(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey
) -> None:
    storage = await open_storage(backend)
    opened, go = asyncio.Event(), asyncio.Event()

    async def child() -> None:
        async with storage.transaction():
            await storage.set_state(other, "child")
            opened.set()
            await go.wait()

    async with storage.transaction():
        task = asyncio.create_task(child())
        await opened.wait()
        await storage.set_state(key, "parent")
    assert await storage.get_state(other) is None
    go.set()
    await task
    assert (await storage.get_state(key), await storage.get_state(other)) == ("parent", "child")


@pytest.mark.parametrize("backend", ROW_LOCKS, ids=str)
async def test_a_child_that_rolls_back_takes_nothing_of_its_parents_with_it(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey
) -> None:
    storage = await open_storage(backend)
    opened, go = asyncio.Event(), asyncio.Event()

    async def child() -> None:
        async with storage.transaction():
            await storage.set_state(other, "child")
            opened.set()
            await go.wait()
            raise ZeroDivisionError

    async with storage.transaction():
        task = asyncio.create_task(child())
        await opened.wait()
        await storage.set_state(key, "parent")
        go.set()
        with pytest.raises(ZeroDivisionError):
            await task
    assert (await storage.get_state(key), await storage.get_state(other)) == ("parent", None)


@pytest.mark.parametrize("backend", ROW_LOCKS, ids=str)
async def test_transactions_of_two_children_run_side_by_side(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey
) -> None:
    storage = await open_storage(backend)
    met = [asyncio.Event(), asyncio.Event()]

    async def child(number: int, own: StorageKey) -> None:
        async with storage.transaction():
            await storage.set_state(own, f"child {number}")
            met[number].set()
            await asyncio.wait_for(met[1 - number].wait(), PATIENCE)

    async with storage.transaction():
        await asyncio.gather(child(0, key), child(1, other))
    assert await storage.get_state(key) == "child 0"
    assert await storage.get_state(other) == "child 1"


@pytest.mark.parametrize("backend", ROW_LOCKS, ids=str)
async def test_a_child_that_waits_for_its_parents_row_is_told_so(
    backend: Backend, open_storage: Open, key: StorageKey, short_wait: float
) -> None:
    storage = await open_storage(backend)

    async def child() -> None:
        async with storage.transaction():
            await storage.set_state(key, "child")

    await storage.set_state(key, "before")
    async with storage.transaction():
        await storage.set_state(key, "parent")
        with pytest.raises(DBAPIError, match="open transaction of this task or of its parent"):
            await asyncio.create_task(child())
        await storage.update_data(key, {"goes": "on"})
    assert await storage.get_state(key) == "parent"
    # The pool's connections wait for locks as long as before.
    await asyncio.gather(*(storage.update_data(key, {str(n): n}) for n in range(10)))


@pytest.mark.parametrize("backend", MARIADB, ids=str)
async def test_a_childs_connection_waits_as_ever_after_a_transaction_that_the_server_has_ended(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 2, "max_overflow": 0})

    def end(session: Session) -> None:
        session.execute(text("COMMIT"))

    def seconds(session: Session) -> Any:
        return session.execute(text("SELECT @@innodb_lock_wait_timeout")).scalar_one()

    async def child() -> None:
        async with storage.transaction():
            assert await storage.run_sync(seconds) == slots.PARENT_WAIT
            await storage.run_sync(end)

    before = await storage.run_sync(seconds)
    async with storage.transaction():
        with pytest.raises(DBAPIError, match="the transaction has ended before its block"):
            await asyncio.create_task(child())
        assert await outside(storage.run_sync(seconds)) == before


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_on_sqlite_a_child_that_waits_for_its_parents_write_lock_is_told_so(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey, short_wait: float
) -> None:
    storage = await open_storage(backend)

    async def child() -> None:
        async with storage.transaction():
            await storage.set_state(other, "child")

    async with storage.transaction():
        await storage.set_state(key, "parent")
        with pytest.raises(RuntimeError, match="open transaction of this task or of its parent"):
            await asyncio.create_task(child())
    assert (await storage.get_state(key), await storage.get_state(other)) == ("parent", None)


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_on_a_pool_of_one_a_child_that_waits_for_its_parents_connection_is_told_so(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey, short_wait: float
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})

    async def child() -> None:
        async with storage.transaction():
            await storage.set_state(other, "child")

    async with storage.transaction():
        await storage.set_state(key, "parent")
        with pytest.raises(RuntimeError, match="open transaction of this task or of its parent"):
            await asyncio.create_task(child())
    assert (await storage.get_state(key), await storage.get_state(other)) == ("parent", None)


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_single_calls_of_children_join_and_are_undone_with_it(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey
) -> None:
    storage = await open_storage(backend)
    with pytest.raises(ZeroDivisionError):
        async with storage.transaction():
            await asyncio.gather(storage.set_state(key, "a"), storage.set_state(other, "b"))
            assert await asyncio.create_task(storage.get_state(other)) == "b"
            raise ZeroDivisionError
    assert (await storage.get_state(key), await storage.get_state(other)) == (None, None)


@asynccontextmanager
async def joined(storage: SQLAlchemyStorage, how: str) -> AsyncGenerator[None, None]:
    """Join a transaction of the storage's, or a session of the application's."""
    if how == "transaction":
        async with storage.transaction():
            yield
        return
    session = new_session(storage)
    async with storage.using(session):
        yield
    for end in (session.commit, session.close):
        ended = end()
        if ended is not None:
            await ended


@pytest.mark.parametrize("backend", SERVERS, ids=str)
@pytest.mark.parametrize("how", ["transaction", "using"])
@pytest.mark.parametrize("depth", [1, 2])
async def test_a_childs_call_is_not_undone_with_a_nested_block_of_its_parent(
    backend: Backend,
    open_storage: Open,
    key: StorageKey,
    other: StorageKey,
    how: str,
    depth: int,
) -> None:
    """Nor does it wait for that block, which may be waiting for the child."""
    storage = await open_storage(backend)
    inside = asyncio.Event()

    async def child() -> Any:
        await inside.wait()
        await storage.set_state(other, "child")
        return await storage.update_data(key, {"child": 1})

    async with joined(storage, how):
        task = asyncio.create_task(child())
        await storage.set_state(key, "outer")
        await storage.update_data(key, {"outer": 1})
        with pytest.raises(ZeroDivisionError):
            async with AsyncExitStack() as blocks:
                for _ in range(depth):
                    await blocks.enter_async_context(storage.transaction())
                await storage.update_data(key, {"nested": 1})
                inside.set()
                assert (await asyncio.wait_for(task, PATIENCE))["nested"] == 1
                assert await storage.get_state(other) == "child"
                raise ZeroDivisionError
        assert await storage.get_state(other) == "child"
    assert (await storage.get_state(key), await storage.get_state(other)) == ("outer", "child")
    assert await storage.get_data(key) == {"outer": 1, "child": 1}


@pytest.mark.parametrize("backend", SERVERS, ids=str)
@pytest.mark.parametrize("how", ["transaction", "using"])
async def test_a_childs_call_is_not_undone_with_a_nested_block_that_is_cancelled(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey, how: str
) -> None:
    """Anyio cancels again and again, while what the call wrote is written again, too."""
    storage = await open_storage(backend)
    inside = asyncio.Event()

    async def child() -> None:
        await inside.wait()
        await storage.set_state(other, "child")

    async with joined(storage, how):
        task = asyncio.create_task(child())
        with CancelScope() as scope:
            async with storage.transaction():
                await storage.set_state(key, "nested")
                inside.set()
                await task
                scope.cancel()
                await asyncio.sleep(PATIENCE)
    assert (await storage.get_state(key), await storage.get_state(other)) == (None, "child")


@pytest.mark.parametrize("backend", ROW_LOCKS, ids=str)
@pytest.mark.parametrize("how", ["transaction", "using"])
async def test_a_childs_call_that_cannot_be_repeated_hides_no_error_and_nothing_is_committed(
    backend: Backend, open_storage: Open, key: StorageKey, other: StorageKey, how: str
) -> None:
    storage = await open_storage(backend)
    inside = asyncio.Event()
    ours, end = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mariadb": ("SELECT connection_id()", "KILL {}"),
    }[backend.server]

    async def child() -> None:
        await inside.wait()
        await storage.set_state(other, "child")

    with pytest.raises(PendingRollbackError, match="could not be undone by itself"):
        async with joined(storage, how):
            task = asyncio.create_task(child())
            with pytest.raises(LookupError):
                async with storage.transaction():
                    inside.set()
                    await task
                    this = await storage.run_sync(lambda session: session.scalar(text(ours)))
                    kill = text(end.format(this))
                    await outside(storage.run_sync(lambda session: session.execute(kill)))
                    raise LookupError
            await storage.set_state(key, "after")
    assert (await storage.get_state(key), await storage.get_state(other)) == (None, None)


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_childs_call_in_a_nested_block_of_its_parent_happens_once(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    inside = asyncio.Event()

    async def child() -> None:
        await inside.wait()
        await storage.set_state(key, "child")

    async with storage.transaction():
        task = asyncio.create_task(child())
        async with storage.transaction():
            inside.set()
            await task
            await storage.set_state(key, "nested")
        assert await storage.get_state(key) == "nested"
    assert await storage.get_state(key) == "nested"


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_childs_call_does_not_fail_with_a_nested_block_of_its_parent(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    inside = asyncio.Event()

    async def child() -> None:
        await inside.wait()
        await storage.set_state(key, "child")

    def fail(session: Session) -> None:
        inside_loop(inside.set)
        time.sleep(0.05)  # the child's call comes after this function, before the block's end
        session.execute(text("SELECT no_such_column"))

    inside_loop = asyncio.get_running_loop().call_soon_threadsafe
    async with storage.transaction():
        task = asyncio.create_task(child())
        with pytest.raises(DBAPIError, match="no_such_column"):
            async with storage.transaction():
                await storage.run_sync(fail)
        await task
    assert await storage.get_state(key) == "child"


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[1]], ids=str)
async def test_a_nested_block_that_waits_for_a_function_of_an_outer_child_is_told_so(
    backend: Backend, open_storage: Open, key: StorageKey, short_wait: float
) -> None:
    storage = await open_storage(backend)
    inside = asyncio.Event()

    async def child() -> None:
        await inside.wait()
        await storage.run_sync(storage.operations.set_state, key, "child")

    async with storage.transaction():
        task = asyncio.create_task(child())
        async with storage.transaction():
            inside.set()
            with pytest.raises(RuntimeError, match="start the task inside the nested block"):
                await task


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_child_of_a_nested_block_joins_the_outer_one_after_its_end(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    go = asyncio.Event()

    async def child() -> None:
        await go.wait()
        await storage.set_state(key, "child")

    with pytest.raises(ZeroDivisionError):
        async with storage.transaction():
            async with storage.transaction():
                task = asyncio.create_task(child())
            go.set()
            await task
            raise ZeroDivisionError
    assert await storage.get_state(key) is None
