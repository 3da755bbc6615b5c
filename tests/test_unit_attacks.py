"""What a unit of work must not do: wait for its own transaction, answer from old reads."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from contextvars import Context
from dataclasses import replace
from typing import Any

import pytest
from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from backends import HAS_SNAPSHOT_ISOLATION, MARIADB, POSTGRESQL, SQLITE, Backend
from blocking import PATIENCE, until
from conftest import Open, dispose, engine_of, new_session
from sqlalchemy import event, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from units import ANOTHER, BEFORE, HISTORY, KEY, LEASES, Bot, outside, running

from hybrid_storage import (
    CorruptDataError,
    FlushMiddleware,
    LockLostError,
    SQLAlchemyStorage,
    isolation,
)

NOT_SQLITE = pytest.mark.parametrize("backend", [*POSTGRESQL, *MARIADB], ids=str)


async def finish(session: Any, how: str) -> None:
    """Commit or close a session, of either kind."""
    done = getattr(session, how)()
    if done is not None:
        await done


# What holds up nobody for ever


@NOT_SQLITE
@pytest.mark.parametrize("lease", [30.0], ids=["lease"])
async def test_a_session_may_be_committed_after_the_lock(
    backend: Backend, open_storage: Open, lease: float
) -> None:
    """Until then it holds the lock's own row; afterwards the lock is free for everybody."""
    async with running(await open_storage(backend), lease) as bot:
        session = new_session(bot.storage)

        async def update() -> None:
            async with bot.update(), bot.storage.using(session):
                await bot.storage.update_data(KEY, {"late": True})

        await asyncio.wait_for(update(), PATIENCE)
        await finish(session, "commit")
        await finish(session, "close")
        other = bot.storage.create_isolation(wait=10)
        async with other.lock(KEY):
            pass
        assert await bot.stored() == ("Form:name", {**BEFORE[1], "late": True})


@NOT_SQLITE
@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushes"])
async def test_a_lock_in_a_transaction_that_fails_is_free_for_everybody(
    backend: Backend, open_storage: Open, flushes: bool
) -> None:
    async with running(await open_storage(backend), 30.0) as bot:

        async def update() -> None:
            async with bot.storage.transaction():
                async with bot.update():
                    await bot.storage.set_state(KEY, "undone")
                    if flushes:
                        await bot.storage.flush()
                        raise LookupError
                raise LookupError

        with pytest.raises(LookupError):
            await asyncio.wait_for(update(), PATIENCE)
        async with bot.storage.create_isolation(wait=10).lock(KEY):
            pass
        assert await bot.stored() == BEFORE


async def test_a_lock_that_is_left_in_another_task_is_free(bot: Bot) -> None:
    async def locked() -> AsyncIterator[int]:
        async with bot.update():
            yield 1
            yield 2

    async def abandon() -> None:
        async for _ in locked():
            break

    await outside(abandon())
    gc.collect()
    await until(lambda: not bot.isolation.still_held(KEY))
    await bot.assert_free()


# What is read is what is there


async def test_what_was_set_to_what_it_was_does_not_hide_what_a_function_writes(bot: Bot) -> None:
    async with bot.update(), bot.storage.transaction():
        await bot.storage.set_data(KEY, BEFORE[1])
        await bot.storage.run_sync(bot.storage.operations.update_data, KEY, {"new": 1})
        assert await bot.storage.get_data(KEY) == {**BEFORE[1], "new": 1}


async def test_what_a_function_writes_is_seen_beside_what_was_collected(bot: Bot) -> None:
    async with bot.update():
        await bot.storage.update_data(KEY, {"collected": 1})
        await bot.storage.run_sync(bot.storage.operations.update_data, KEY, {"written": 2})
        expected = {**BEFORE[1], "collected": 1, "written": 2}
        assert await bot.storage.get_data(KEY) == expected
    assert await bot.stored() == ("Form:name", expected)


async def test_a_lock_in_a_transaction_sees_what_that_has_written(bot: Bot) -> None:
    async with bot.storage.transaction():
        await bot.storage.update_data(KEY, {"before": 1})
        async with bot.update():
            assert await bot.storage.get_data(KEY) == {**BEFORE[1], "before": 1}
            await bot.storage.set_data(KEY, {"before": 1, "inside": 2})
    assert await bot.stored() == ("Form:name", {"before": 1, "inside": 2})
    await bot.assert_free()


@NOT_SQLITE
async def test_a_transaction_older_than_a_lock_that_was_lost_is_rolled_back(
    backend: Backend, open_storage: Open
) -> None:
    async with running(await open_storage(backend), 30.0) as bot:
        locks = bot.storage.metadata.tables[f"{bot.storage.table.name}_lock"]
        taken_over = update(locks).values(owner="another", version=locks.c.version + 1)

        async def overtaken() -> None:
            async with bot.storage.transaction():
                await bot.storage.update_data(ANOTHER, {"older": True})
                async with bot.update():
                    await bot.storage.set_state(KEY, "overtaken")
                    await outside(bot.storage.run_sync(lambda session: session.execute(taken_over)))

        with pytest.raises(LockLostError, match="'42:7:7' was lost"):
            await overtaken()
        assert await bot.stored() == BEFORE
        assert await bot.stored(ANOTHER) == (None, {})


@pytest.mark.parametrize("backend", MARIADB if HAS_SNAPSHOT_ISOLATION else [], ids=str)
async def test_a_transaction_older_than_a_lock_is_told_what_has_changed_besides(
    backend: Backend, open_storage: Open
) -> None:
    async with running(await open_storage(backend), 30.0) as bot:

        async def overtaken() -> None:
            async with bot.storage.transaction():
                assert await bot.storage.get_state(ANOTHER) is None  # a snapshot
                await bot.meanwhile("update_data", {"newer": True})
                async with bot.update():
                    await bot.storage.set_state(KEY, "overtaken")

        with pytest.raises(DBAPIError, match=r"1020, .Record has changed"):
            await overtaken()
        assert await bot.stored() == ("Form:name", {**BEFORE[1], "newer": True})
        await bot.assert_free()


async def test_a_destiny_that_the_database_refuses_is_refused_once(bot: Bot) -> None:
    long = replace(KEY, destiny="x" * 3000)
    async with bot.update():
        with suppress(ValueError):
            await bot.storage.get_data(long)
    async with bot.update():
        assert await bot.storage.get_state(KEY) == "Form:name"


async def test_a_task_with_a_lock_of_its_own_sees_what_the_update_has_collected(bot: Bot) -> None:
    async def child() -> None:
        async with bot.update(ANOTHER):
            assert await bot.storage.get_value(KEY, "collected") == 1

    async with bot.update():
        await bot.storage.update_data(KEY, {"collected": 1})
        await asyncio.create_task(child())


async def test_a_flush_in_a_task_of_the_update_writes(bot: Bot) -> None:
    """``asyncio.wait_for()`` makes one before Python 3.12, and ``asyncio.gather()`` always."""
    async with bot.update():
        await bot.storage.set_state(KEY, "flushed")
        await asyncio.gather(bot.storage.flush())
        assert (await bot.stored())[0] == "flushed"
        await bot.storage.set_data(HISTORY, {"history": [1]})
        await asyncio.create_task(bot.storage.flush())
        assert await bot.stored(HISTORY) == (None, {"history": [1]})


@pytest.mark.parametrize("backend", MARIADB, ids=str)
async def test_a_snapshot_older_than_the_lock_is_not_what_an_update_reads(
    backend: Backend, open_storage: Open
) -> None:
    """An application's hook may read at the begin of each transaction, a tenant for instance."""
    storage: SQLAlchemyStorage = await open_storage(backend)
    table = storage.table.name
    async with running(storage, 30.0):
        engine = engine_of(storage)

        def read(connection: Any) -> None:
            connection.exec_driver_sql(f"SELECT count(*) FROM {table}").all()

        event.listen(engine, "begin", read)
        isolations = [storage.create_isolation(unit_of_work=True, poll=0.03) for _ in range(3)]

        async def count(number: int) -> None:
            async with isolations[number % 3].lock(KEY):
                seen = await storage.get_value(KEY, "count", 0)
                await storage.update_data(KEY, {"count": seen + 1})

        await asyncio.gather(*(outside(count(number)) for number in range(30)))
        event.remove(engine, "begin", read)
        assert await storage.get_value(KEY, "count") == 30


# A session that is used by two tasks at a time


@pytest.mark.parametrize("backend", POSTGRESQL[1:], ids=str)
async def test_a_transaction_that_cannot_be_rolled_back_is_not_handed_on(
    backend: Backend, open_storage: Open
) -> None:
    """The next call on its connection would be acknowledged, and never committed."""
    options = {"pool_size": 2, "max_overflow": 0}
    storage: SQLAlchemyStorage[Any] = await open_storage(backend, engine_options=options)
    one = text("SELECT 1")
    for number in range(5):
        with pytest.raises(SQLAlchemyError):
            async with storage.transaction() as session:
                await asyncio.gather(*(session.scalar(one) for _ in range(3)))
        await asyncio.sleep(0.05)
        await storage.update_data(KEY, {"number": number})
    engine = backend.engine(engine_of(storage).url)
    other = SQLAlchemyStorage(backend.factory(engine), table_name=storage.table.name)
    assert await other.get_value(KEY, "number") == 4
    await dispose(engine)


def test_a_flush_middleware_takes_a_storage() -> None:
    wrong: Any = "storage"
    with pytest.raises(TypeError, match="takes a SQLAlchemyStorage"):
        FlushMiddleware(wrong)


# Two keys of one row


class PerUser(KeyBuilder):
    """One conversation a user, whatever the chat."""

    def build(self, key: StorageKey, part: str | None = None) -> str:
        return f"user-{key.user_id}:{key.destiny}"


@pytest.mark.parametrize("lease", LEASES.values(), ids=LEASES)
async def test_two_keys_of_one_row_are_one_conversation(
    backend: Backend, open_storage: Open, lease: float | None
) -> None:
    group = replace(KEY, chat_id=-100)
    async with running(await open_storage(backend, key_builder=PerUser()), lease) as bot:

        async def update() -> None:
            async with bot.update():
                await bot.storage.update_data(KEY, {"private": 1})
                async with bot.update(group), bot.update(replace(group, destiny="other")):
                    await bot.storage.update_data(group, {"group": 2})
                    await bot.storage.set_state(replace(group, destiny="other"), "other")
                assert await bot.stored() == BEFORE
                both = await bot.storage.get_data(KEY)
                assert both == {**BEFORE[1], "private": 1, "group": 2}

        await asyncio.wait_for(update(), PATIENCE)
        assert await bot.stored(group) == (
            "Form:name",
            {**BEFORE[1], "private": 1, "group": 2},
        )
        assert (await bot.stored(replace(KEY, destiny="other")))[0] == "other"
        with pytest.raises(RuntimeError, match="already"):
            async with bot.update(), bot.update(group), bot.update(group):
                pass
        await bot.assert_free(group)


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[0]], ids=str)
async def test_synchronous_code_of_a_handler_is_refused_the_same_row_by_another_key(
    backend: Backend, open_storage: Open
) -> None:
    group = replace(KEY, chat_id=-100)
    async with running(await open_storage(backend, key_builder=PerUser()), 30.0) as bot:

        def lock_again() -> None:
            with bot.isolation.lock_sync(group):
                pass

        async with bot.update():
            with pytest.raises(RuntimeError, match="would wait"):
                await bot.storage.run_sync(lambda _: lock_again())


# Two event loops of one process


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[0], *MARIADB[:1]], ids=str)
async def test_locks_in_memory_are_of_one_event_loop_at_a_time(
    backend: Backend, open_storage: Open
) -> None:
    async with running(await open_storage(backend), None) as bot:

        async def enter(key: StorageKey = KEY) -> None:
            async with bot.update(key):
                await bot.storage.update_data(key, {"in": 1})

        def in_another_loop() -> None:
            asyncio.run(asyncio.wait_for(enter(), PATIENCE))

        async with bot.update(ANOTHER):
            with pytest.raises(RuntimeError, match="leave out lease=None"):
                await asyncio.to_thread(in_another_loop)
            await outside(enter())
        await asyncio.to_thread(in_another_loop)  # nobody holds any
        await bot.assert_free()


@pytest.mark.parametrize("backend", SQLITE[:1], ids=str)
async def test_an_event_loop_that_was_closed_with_a_lock_keeps_nobody_out(
    backend: Backend, open_storage: Open
) -> None:
    async with running(await open_storage(backend), None) as bot:
        held: list[Any] = []  # or the loop would leave it while it is still open

        async def enter() -> None:
            held.append(bot.isolation.lock(KEY))
            await held[0].__aenter__()

        def abandon() -> asyncio.AbstractEventLoop:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(Context().run(loop.create_task, enter()))
            loop.close()
            return loop

        loop = await asyncio.to_thread(abandon)
        assert loop.is_closed()
        await bot.assert_free()


@pytest.mark.parametrize("backend", SQLITE[:1], ids=str)
async def test_a_forked_process_may_use_the_locks_of_its_parents_memory(
    backend: Backend, open_storage: Open
) -> None:
    async with running(await open_storage(backend), None) as bot:

        async def enter() -> None:
            async with bot.isolation.lock(ANOTHER):
                pass

        async with bot.update():
            child = os.fork()
            if child == 0:
                done = threading.Event()

                def work() -> None:
                    asyncio.run(enter())
                    done.set()

                threading.Thread(target=work, daemon=True).start()
                os._exit(0 if done.wait(PATIENCE) else 1)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


# A lock of a child task inside its parent's transaction, on SQLite, which has one writer


@pytest.mark.parametrize("backend", SQLITE, ids=str)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
async def test_a_childs_lock_waits_for_the_end_of_its_parents_transaction(
    backend: Backend, open_storage: Open, fails: bool
) -> None:
    """Taken in that transaction, it would be undone with it, and the child not be alone."""
    async with running(await open_storage(backend), 30.0) as bot:
        entered, go = asyncio.Event(), asyncio.Event()

        async def child() -> None:
            async with bot.update(ANOTHER):
                entered.set()
                await go.wait()
                await bot.storage.set_state(ANOTHER, "child")

        tasks: list[asyncio.Task[None]] = []
        try:
            async with bot.storage.transaction():
                await bot.storage.set_state(KEY, "parent")
                tasks.append(asyncio.create_task(child()))
                await asyncio.sleep(0.1)
                assert not entered.is_set()
                if fails:
                    raise LookupError
        except LookupError:
            pass
        await asyncio.wait_for(entered.wait(), PATIENCE)
        impatient = bot.storage.create_isolation(wait=0.2)
        with pytest.raises(TimeoutError):
            async with impatient.lock(ANOTHER):
                pytest.fail("two were inside")
        go.set()
        await asyncio.gather(*tasks)
        assert await bot.stored(ANOTHER) == ("child", {})
        assert await bot.stored() == ("Form:name" if fails else "parent", BEFORE[1])


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_a_transaction_that_waits_for_its_childs_lock_is_told_so(
    backend: Backend, open_storage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "PARENT_WAIT", 0.3)
    async with running(await open_storage(backend), 30.0) as bot:

        async def child() -> None:
            async with bot.update(ANOTHER):
                pytest.fail("it has the lock")

        async with bot.storage.transaction():
            await bot.storage.set_state(KEY, "parent")
            with pytest.raises(RuntimeError, match="take the lock first"):
                await asyncio.create_task(child())
        assert await bot.stored() == ("parent", BEFORE[1])
        await bot.assert_free(ANOTHER)


# What a block that fails takes back


@pytest.mark.parametrize("is_nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushes"])
async def test_what_a_child_has_collected_is_not_undone_with_its_parents_block(
    bot: Bot, is_nested: bool, flushes: bool
) -> None:
    storage = bot.storage
    await storage.set_state(HISTORY, "to be cleared")
    writes, written = asyncio.Event(), asyncio.Event()

    async def child() -> None:
        await writes.wait()
        await storage.update_data(KEY, {"child": 1})
        await storage.set_state(HISTORY, None)
        written.set()

    async def parent() -> None:
        task = asyncio.create_task(child())
        await storage.update_data(KEY, {"before": 1})
        with pytest.raises(LookupError):
            async with storage.transaction():
                await storage.update_data(KEY, {"failed": 1})
                writes.set()
                await written.wait()
                await storage.set_state(KEY, "failed")
                if flushes:
                    await storage.flush()
                raise LookupError
        await task
        assert await storage.get_data(KEY) == {**BEFORE[1], "before": 1, "child": 1}
        assert await storage.get_state(HISTORY) is None

    async def update() -> None:
        async with bot.update(), storage.transaction() if is_nested else nullcontext():
            await parent()
        assert await bot.stored() == ("Form:name", {**BEFORE[1], "before": 1, "child": 1})
        assert await bot.stored(HISTORY) == (None, {})

    await asyncio.wait_for(update(), PATIENCE)


async def test_what_a_child_writes_to_a_session_is_not_undone_with_a_nested_block(
    bot: Bot,
) -> None:
    writes = asyncio.Event()

    async def child() -> None:
        await writes.wait()
        await bot.storage.update_data(KEY, {"child": 1})

    async def update() -> None:
        session = new_session(bot.storage)
        async with bot.update():
            async with bot.storage.using(session):
                task = asyncio.create_task(child())
                await bot.storage.update_data(KEY, {"before": 1})
                with pytest.raises(LookupError):
                    async with bot.storage.transaction():
                        await bot.storage.update_data(KEY, {"failed": 1})
                        writes.set()
                        await task
                        raise LookupError
                expected = {**BEFORE[1], "before": 1, "child": 1}
                assert await bot.storage.get_data(KEY) == expected
            await finish(session, "commit")
            await finish(session, "close")
        assert await bot.stored() == ("Form:name", expected)

    await asyncio.wait_for(update(), PATIENCE)


async def test_what_a_child_clears_in_its_parents_block_stays_cleared(bot: Bot) -> None:
    await bot.storage.set_state(HISTORY, "to be cleared")
    writes = asyncio.Event()

    async def child() -> None:
        await writes.wait()
        await bot.storage.clear(HISTORY)

    async with bot.update():
        task = asyncio.create_task(child())
        with pytest.raises(LookupError):
            async with bot.storage.transaction():
                writes.set()
                await task
                await bot.storage.flush()
                raise LookupError
    assert await bot.stored(HISTORY) == (None, {})


async def test_a_task_that_is_started_in_a_block_is_undone_with_it(bot: Bot) -> None:
    async def child(state: str, may_write: asyncio.Event) -> None:
        await may_write.wait()
        await bot.storage.set_state(HISTORY, state)

    async with bot.update(), bot.storage.transaction():
        at_once, late = asyncio.Event(), asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(LookupError):
            async with bot.storage.transaction():
                inside = asyncio.create_task(child("undone", at_once))
                tasks.append(asyncio.create_task(child("late", late)))
                at_once.set()
                await inside
                raise LookupError
        assert await bot.storage.get_state(HISTORY) is None
        late.set()
        await asyncio.gather(*tasks)
    assert await bot.stored(HISTORY) == ("late", {})


async def test_data_that_a_failed_block_has_replaced_are_as_they_were(bot: Bot) -> None:
    def corrupt(session: Any) -> None:
        table = bot.storage.table
        session.execute(table.update().values(data="{"))

    await bot.storage.run_sync(corrupt)
    writes = asyncio.Event()

    async def child() -> None:
        await writes.wait()
        await bot.storage.update_data(KEY, {"child": 1})

    async with bot.update():
        task = asyncio.create_task(child())
        with pytest.raises(LookupError):
            async with bot.storage.transaction():
                await bot.storage.set_data(KEY, {})
                writes.set()
                await task
                raise LookupError
        with pytest.raises(CorruptDataError):
            await bot.storage.get_data(KEY)
