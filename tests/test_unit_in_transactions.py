"""Units of work inside transactions of the application's."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import CancelScope
from backends import POSTGRESQL, Backend
from conftest import Open
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker
from units import ANOTHER, BEFORE, KEY, LEASES, running

from hybrid_storage import LockLostError, SQLAlchemyStorage


async def test_a_function_of_the_transaction_may_be_called_after_all_was_written(
    tmp_path: Path, key: StorageKey
) -> None:
    """What was written is forgotten then, and the lease is renewed at the end all the same."""
    engine = create_engine(f"sqlite:///{tmp_path / 'bot.db'}")
    storage = SQLAlchemyStorage(sessionmaker(engine))
    isolation = storage.create_isolation(unit_of_work=True)
    await storage.create_table()
    async with isolation.lock(key), storage.transaction():
        await storage.set_state(key, "paid")
        await storage.run_sync(lambda session: None)
    assert await storage.get_state(key) == "paid"
    engine.dispose()


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_a_row_that_another_has_made_since_is_a_serialization_failure_or_changed(
    backend: Backend, open_storage: Open, level: str
) -> None:
    """At the higher level the transaction does not see it, but its own insert would meet it."""
    storage = await open_storage(backend, engine_options={"isolation_level": level})

    async def overtaken() -> None:
        async with bot.update(ANOTHER), storage.transaction():
            assert await storage.get_data(ANOTHER) == {}
            await bot.meanwhile("update_data", {"newer": 1}, key=ANOTHER)
            await storage.update_data(ANOTHER, {"mine": 1})
            await storage.flush()

    async with running(storage, None) as bot:
        if level == "READ COMMITTED":
            await overtaken()
            assert await storage.get_data(ANOTHER) == {"newer": 1, "mine": 1}
        else:
            with pytest.raises(DBAPIError) as caught:
                await overtaken()
            assert getattr(caught.value.orig, "sqlstate", None) == "40001"
            assert await storage.get_data(ANOTHER) == {"newer": 1}


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_a_transaction_that_is_too_old_to_see_its_lock_is_told_so(
    backend: Backend, open_storage: Open
) -> None:
    level = {"isolation_level": "REPEATABLE READ"}
    storage: SQLAlchemyStorage = await open_storage(backend, engine_options=level)

    async def too_old() -> None:
        async with storage.transaction():
            assert await storage.get_state(ANOTHER) is None  # a snapshot
            async with bot.update():
                await storage.set_state(KEY, "too late")

    async with running(storage, 30.0) as bot:
        with pytest.raises(LockLostError, match=r"is written\. Or .*: take the lock first"):
            await too_old()
        assert await bot.stored() == BEFORE
        await bot.assert_free()


@pytest.mark.parametrize("lease", LEASES.values(), ids=LEASES)
async def test_a_cancellation_during_the_commit_takes_nothing_back(
    backend: Backend, open_storage: Open, lease: float | None
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend)
    loop = asyncio.get_running_loop()
    async with running(storage, lease) as bot, bot.update():
        await storage.set_state(KEY, "before")
        with CancelScope() as scope:

            def cancel(session: Session) -> None:
                loop.call_soon_threadsafe(scope.cancel)
                time.sleep(0.02)

            async with storage.transaction():
                await storage.run_sync(event.listen, "before_commit", cancel, once=True)
                await storage.set_state(KEY, "paid")
                await storage.update_data(KEY, {"paid": 1})
        assert scope.cancelled_caught
        assert await storage.get_state(KEY) == "paid"
        assert await storage.get_data(KEY) == {**BEFORE[1], "paid": 1}
        await storage.update_data(KEY, {"after": 1})
    assert await storage.get_state(KEY) == "paid"
    assert await storage.get_data(KEY) == {**BEFORE[1], "paid": 1, "after": 1}


@pytest.mark.parametrize("lease", LEASES.values(), ids=LEASES)
async def test_what_another_task_writes_while_a_block_fails_is_found_by_its_columns(
    backend: Backend, open_storage: Open, lease: float | None
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True)
    async with running(storage, lease) as bot:
        begun = asyncio.Event()

        async def write() -> None:
            await begun.wait()
            await storage.set_state(KEY, "beside")

        async with bot.update():
            await storage.get_state(KEY)
            task = asyncio.create_task(write())
            with pytest.raises(LookupError):
                async with storage.transaction():
                    begun.set()
                    await task
                    raise LookupError
        found = [each async for each in storage.find(user_id=KEY.user_id, chat_id=KEY.chat_id)]
        assert [(each.key, each.state, each.data) for each in found] == [(KEY, "beside", BEFORE[1])]
