"""The unit of work beside transactions, tasks, other locks, and columns of the application's own.

On each driver, with a lease in the database and without.
"""

from __future__ import annotations

import asyncio
import datetime
import uuid
from dataclasses import replace
from typing import Any

import pytest
from backends import Backend
from conftest import Open, new_session, rows
from sqlalchemy import DateTime, String, func, select, update
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from test_encrypted_data import Encrypted
from units import ANOTHER, BEFORE, HISTORY, KEY, LEASES, Bot, outside, running

from hybrid_storage import FSMData, LockLostError

# Flushing


async def test_a_flush_writes_at_once_and_for_good(bot: Bot) -> None:
    with pytest.raises(LookupError):
        async with bot.update():
            await bot.storage.set_state(KEY, "flushed")
            await bot.storage.flush()
            assert await bot.stored() == ("flushed", BEFORE[1])
            await bot.storage.update_data(KEY, {"lost": True})
            raise LookupError
    assert await bot.stored() == ("flushed", BEFORE[1])


async def test_after_a_flush_the_update_goes_on(bot: Bot) -> None:
    await bot.storage.flush()  # of nothing
    async with bot.update():
        await bot.storage.flush()
        for number in range(3):
            await bot.storage.update_data(KEY, {f"{number}": number})
            await bot.meanwhile("update_data", {f"other{number}": number})
            await bot.storage.flush()
            assert (await bot.stored())[1].keys() >= {f"{number}", f"other{number}"}
        await bot.storage.clear(KEY)
        await bot.storage.flush()
        assert await bot.stored() == (None, {})
        await bot.storage.set_state(KEY, "again")
    assert await bot.stored() == ("again", {})


@pytest.mark.parametrize("bot", [LEASES["lease"]], ids=["lease"], indirect=True)
async def test_a_handler_that_lost_its_lock_writes_nothing(bot: Bot) -> None:
    locks = bot.storage.metadata.tables[f"{bot.storage.table.name}_lock"]
    taken_over = update(locks).values(owner="another", version=locks.c.version + 1)
    with pytest.raises(LockLostError, match="'42:7:7' was lost"):
        async with bot.update():
            await bot.storage.set_state(KEY, "overtaken")
            await outside(bot.storage.run_sync(lambda session: session.execute(taken_over)))
    assert await bot.stored() == BEFORE


# Transactions


async def test_what_was_collected_is_committed_with_the_transaction(bot: Bot) -> None:
    with pytest.raises(LookupError):
        async with bot.update():
            await bot.storage.set_state(KEY, "before")
            async with bot.storage.transaction():
                assert await bot.storage.get_state(KEY) == "before"
                await bot.storage.update_data(KEY, {"inside": 1})
            assert await bot.stored() == ("before", {**BEFORE[1], "inside": 1})
            await bot.storage.set_state(KEY, "after")
            raise LookupError
    assert await bot.stored() == ("before", {**BEFORE[1], "inside": 1})
    await bot.assert_free()


async def test_a_transaction_that_fails_gives_the_unit_back_as_it_was_before(bot: Bot) -> None:
    async with bot.update():
        await bot.storage.update_data(KEY, {"before": 1})
        with pytest.raises(LookupError):
            async with bot.storage.transaction():
                await bot.storage.set_state(KEY, "failed")
                await bot.storage.update_data(KEY, {"failed": 1})
                await bot.storage.set_state(HISTORY, "failed")
                await bot.storage.flush()
                assert await bot.storage.get_state(HISTORY) == "failed"
                raise LookupError
        assert await bot.storage.get_state(KEY) == "Form:name"
        assert await bot.storage.get_data(KEY) == {**BEFORE[1], "before": 1}
        assert await bot.stored() == BEFORE
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "before": 1})
    assert await bot.stored(HISTORY) == (None, {})


@pytest.mark.parametrize("flushes", [False, True])
async def test_a_nested_transaction_that_fails_undoes_itself_alone(bot: Bot, flushes: bool) -> None:
    async with bot.update():
        async with bot.storage.transaction():
            await bot.storage.update_data(KEY, {"outer": 1})
            with pytest.raises(LookupError):
                async with bot.storage.transaction():
                    await bot.storage.update_data(KEY, {"inner": 1})
                    if flushes:
                        await bot.storage.flush()
                    raise LookupError
            assert "inner" not in await bot.storage.get_data(KEY)
            await bot.storage.update_data(KEY, {"last": 1})
        assert await bot.stored() == ("Form:name", {**BEFORE[1], "outer": 1, "last": 1})
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "outer": 1, "last": 1})


async def test_a_whole_update_may_be_in_a_transaction_of_its_caller(bot: Bot) -> None:
    for error in (LookupError, None):
        try:
            async with bot.update(), bot.storage.transaction():
                await bot.storage.set_state(KEY, "inside")
                if error is not None:
                    raise error
        except LookupError:
            assert await bot.stored() == BEFORE
    assert await bot.stored() == ("inside", BEFORE[1])


async def test_synchronous_code_in_a_transaction_sees_what_was_collected(bot: Bot) -> None:
    def pay(session: Session) -> dict[str, Any]:
        return bot.storage.operations.update_data(session, KEY, {"paid": True})

    async with bot.update(), bot.storage.transaction():
        await bot.storage.update_data(KEY, {"age": 36})
        both = {**BEFORE[1], "age": 36, "paid": True}
        assert await bot.storage.run_sync(pay) == both
        assert await bot.storage.get_data(KEY) == both
        await bot.storage.set_state(KEY, "paid")
    assert await bot.stored() == ("paid", both)


async def test_what_synchronous_code_commits_is_read_afterwards(bot: Bot) -> None:
    def pay(session: Session) -> dict[str, Any]:
        return bot.storage.operations.update_data(session, KEY, {"paid": True})

    async with bot.update():
        await bot.storage.get_data(KEY)
        assert await bot.storage.run_sync(pay) == {**BEFORE[1], "paid": True}
        assert await bot.storage.get_data(KEY) == {**BEFORE[1], "paid": True}
        await bot.storage.update_data(KEY, {"age": 36})
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "paid": True, "age": 36})


async def test_a_session_that_was_lent_gets_each_write_at_once(bot: Bot, backend: Backend) -> None:
    async def close(session: Any, end: str) -> None:
        for name in (end, "close"):
            result = getattr(session, name)()
            if backend.is_async:
                await result

    async with bot.update():
        for end, after in [("rollback", BEFORE), ("commit", ("commit", {**BEFORE[1], "lent": 1}))]:
            session = new_session(bot.storage)
            async with bot.storage.using(session):
                await bot.storage.set_state(KEY, end)
                await bot.storage.update_data(KEY, {"lent": 1})
            await close(session, end)
            assert await bot.storage.get_state(KEY) == after[0]
            assert await bot.stored() == after
    assert await bot.stored() == after


# Tasks


async def test_tasks_of_a_handler_take_part_in_its_unit(bot: Bot) -> None:
    numbers = range(10)
    async with bot.update():
        await asyncio.gather(*(bot.storage.update_data(KEY, {f"{n}": n}) for n in numbers))
        assert await bot.stored() == BEFORE
    assert await bot.stored() == ("Form:name", {**BEFORE[1], **{f"{n}": n for n in numbers}})


async def test_a_transaction_of_a_task_has_no_part_in_the_unit(bot: Bot) -> None:
    async def child() -> None:
        async with bot.storage.transaction():
            await bot.storage.update_data(KEY, {"child": 1})

    with pytest.raises(LookupError):
        async with bot.update():
            await bot.storage.update_data(KEY, {"parent": 1})
            await asyncio.ensure_future(child())
            assert await bot.stored() == ("Form:name", {**BEFORE[1], "child": 1})
            raise LookupError
    assert await bot.stored() == ("Form:name", {**BEFORE[1], "child": 1})


async def test_a_task_that_is_left_behind_writes_at_once(bot: Bot) -> None:
    may_write = asyncio.Event()

    async def late() -> None:
        await may_write.wait()
        await bot.storage.update_data(KEY, {"late": 1})
        assert await bot.storage.get_state(KEY) == "ended"

    async with bot.update():
        await bot.storage.set_state(KEY, "ended")
        task = asyncio.ensure_future(late())
        await asyncio.sleep(0)
    may_write.set()
    await task
    assert await bot.stored() == ("ended", {**BEFORE[1], "late": 1})


async def test_an_update_that_a_handler_starts_has_a_unit_of_its_own(bot: Bot) -> None:
    async def another_update() -> None:
        async with bot.update():
            assert await bot.storage.get_state(KEY) == "first"
            await bot.storage.update_data(KEY, {"second": 1})

    async with bot.update():
        await bot.storage.set_state(KEY, "first")
        task = asyncio.ensure_future(another_update())
        await asyncio.sleep(0.01)
    await task
    assert await bot.stored() == ("first", {**BEFORE[1], "second": 1})


# Conversations


async def test_another_conversation_is_written_at_once(bot: Bot) -> None:
    with pytest.raises(LookupError):
        async with bot.update():
            await bot.storage.set_state(ANOTHER, "told")
            assert await bot.stored(ANOTHER) == ("told", {})
            raise LookupError
    assert await bot.stored(ANOTHER) == ("told", {})


async def test_another_destiny_of_the_conversation_is_part_of_the_unit(bot: Bot) -> None:
    with pytest.raises(LookupError):
        async with bot.update():
            async with bot.update(HISTORY):
                await bot.storage.set_state(HISTORY, "inner")
            assert await bot.storage.get_state(HISTORY) == "inner"
            raise LookupError
    assert await bot.stored(HISTORY) == (None, {})


async def test_another_conversations_lock_has_a_unit_of_its_own(bot: Bot) -> None:
    with pytest.raises(LookupError):
        async with bot.update():
            await bot.storage.set_state(KEY, "outer")
            async with bot.update(replace(ANOTHER, destiny="aiogd:stack:")):
                await bot.storage.set_state(ANOTHER, "inner")
                await bot.storage.update_data(KEY, {"outer": 1})
                assert await bot.stored(ANOTHER) == (None, {})
            assert await bot.stored(ANOTHER) == ("inner", {})
            assert await bot.storage.get_data(KEY) == {**BEFORE[1], "outer": 1}
            raise LookupError
    assert await bot.stored() == BEFORE
    assert await bot.stored(ANOTHER) == ("inner", {})
    await bot.assert_free()
    await bot.assert_free(ANOTHER)


# Columns of the application's own

LONG_AGO = datetime.datetime(2001, 1, 1)


def now() -> datetime.datetime:
    return datetime.datetime.now()


@pytest.mark.parametrize("lease", LEASES.values(), ids=LEASES)
@pytest.mark.parametrize(
    ("onupdate", "text"),
    [
        pytest.param(func.current_timestamp(), None, id="SQL"),
        pytest.param(now, Encrypted, id="Python, and encrypted data"),
    ],
)
async def test_columns_of_the_applications_own_are_written_along(
    backend: Backend, open_storage: Open, lease: float | None, onupdate: Any, text: Any
) -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = f"fsm_{uuid.uuid4().hex}"
        updated_at: Mapped[datetime.datetime | None] = mapped_column(
            DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb"), onupdate=onupdate
        )
        tenant: Mapped[str] = mapped_column(String(20), server_default="nobody")
        made_by: Mapped[str] = mapped_column(String(20), default=lambda: "the bot")
        if text is not None:
            data: Mapped[str | None] = mapped_column(text)

    async with running(await open_storage(backend, table_name=Conversation), lease) as bot:
        old = update(Conversation).values(updated_at=LONG_AGO)
        for change in ({"name": "Ada"}, {"name": "Eve"}):  # the first changes nothing
            await bot.storage.run_sync(lambda session: session.execute(old))
            async with bot.update():
                await bot.storage.update_data(KEY, change)
                await bot.storage.set_state(HISTORY, "new")
                await bot.meanwhile("update_data", {"seen": [2]})
            moved = await bot.storage.run_sync(
                lambda session: session.scalars(select(Conversation.updated_at)).all()
            )
            assert max(each for each in moved if each is not None) > LONG_AGO
            assert await bot.stored() == ("Form:name", {**change, "seen": [2]})
        found = await bot.storage.run_sync(
            lambda session: session.execute(select(Conversation.tenant, Conversation.made_by)).all()
        )
        assert {tuple(each) for each in found} == {("nobody", "the bot")}
        async with bot.update():
            await bot.storage.clear(KEY)
            await bot.storage.clear(HISTORY)
        assert await rows(bot.storage) == []
