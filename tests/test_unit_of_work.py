"""The unit of work: what a handler does to its conversation is read once and written once.

On each driver, with a lease in the database and without. Transactions are in
``test_unit_transactions.py``, whole bots in ``test_unit_bots.py``.
"""

from __future__ import annotations

import asyncio

import pytest
from aiogram.dispatcher.event.bases import CancelHandler, SkipHandler
from backends import MARIADB, POSTGRESQL, Backend
from blocking import give_way, statements, until
from sqlalchemy import text
from units import BEFORE, HISTORY, KEY, Bot, writes

# Reads


async def test_a_conversation_is_read_once(bot: Bot) -> None:
    async with bot.update():
        assert await bot.storage.get_state(KEY) == "Form:name"
        with statements(bot.storage.table.name) as seen:
            assert await bot.storage.get_data(KEY) == BEFORE[1]
            assert await bot.storage.get_value(KEY, "name") == "Ada"
            assert await bot.storage.get_state(KEY) == "Form:name"
        assert seen == []


async def test_what_the_last_update_has_read_is_read_along_with_the_first_row(bot: Bot) -> None:
    async with bot.update():
        assert await bot.storage.get_data(HISTORY) == {}
    await bot.meanwhile("set_data", {"history": []}, key=HISTORY)
    async with bot.update():
        await bot.storage.get_state(KEY)
        with statements(bot.storage.table.name) as seen:
            assert await bot.storage.get_data(HISTORY) == {"history": []}
        assert seen == []


async def test_each_read_gives_a_copy_of_its_own(bot: Bot) -> None:
    given = {"seen": [2]}
    async with bot.update():
        data = await bot.storage.get_data(KEY)
        data["seen"].append("changed")
        data["name"] = "changed"
        assert await bot.storage.get_data(KEY) == BEFORE[1]
        result = await bot.storage.update_data(KEY, given)
        given["seen"].append("changed")  # type: ignore[arg-type]
        result["seen"].append("changed")
        assert await bot.storage.get_data(KEY) == {"name": "Ada", "seen": [2]}
    assert await bot.stored() == ("Form:name", {"name": "Ada", "seen": [2]})


async def test_an_update_reads_what_the_last_one_wrote_though_another_wrote_in_between(
    bot: Bot,
) -> None:
    for number in range(3):
        async with bot.update():
            assert await bot.storage.get_value(KEY, "number", 0) == 2 * number
            await bot.storage.update_data(KEY, {"number": 2 * number + 1})
        await bot.meanwhile("update_data", {"number": 2 * number + 2})


# Writes


async def test_writes_are_seen_inside_at_once_and_by_others_at_the_end(bot: Bot) -> None:
    async with bot.update():
        with statements(bot.storage.table.name) as seen:
            await bot.storage.set_state(KEY, "Form:age")
            assert await bot.storage.update_data(KEY, {"age": 36}) == {**BEFORE[1], "age": 36}
            await bot.storage.set_data(HISTORY, {"history": ["name"]})
            assert await bot.storage.get_state(KEY) == "Form:age"
            assert await bot.storage.get_data(HISTORY) == {"history": ["name"]}
        assert writes(bot.storage, seen) == 0
        assert await bot.stored() == BEFORE
    assert await bot.stored() == ("Form:age", {**BEFORE[1], "age": 36})
    assert await bot.stored(HISTORY) == (None, {"history": ["name"]})
    await bot.assert_free()


async def test_a_conversation_is_cleared_and_begun_anew(bot: Bot) -> None:
    async with bot.update():
        await bot.storage.clear(KEY)
        assert await bot.storage.get_data(KEY) == {}
    assert await bot.stored() == (None, {})
    async with bot.update():
        await bot.storage.update_data(KEY, {"again": True})
    assert await bot.stored() == (None, {"again": True})


async def test_what_stays_as_it_was_is_not_written(bot: Bot) -> None:
    with statements(bot.storage.table.name) as seen:
        async with bot.update():
            await bot.storage.set_state(KEY, "other")
            await bot.storage.set_state(KEY, "Form:name")
            await bot.storage.update_data(KEY, {"name": "Ada"})
            await bot.storage.clear(HISTORY)
    assert writes(bot.storage, seen) == 0
    assert await bot.stored() == BEFORE


class Interruption(BaseException):
    """What asyncio's own base exceptions are like."""


@pytest.mark.parametrize("error", [LookupError, Interruption, asyncio.CancelledError])
async def test_a_handler_that_fails_leaves_nothing_and_frees_the_lock(
    bot: Bot, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        async with bot.update():
            await bot.storage.set_state(KEY, "failed")
            await bot.storage.update_data(HISTORY, {"failed": True})
            raise error
    assert await bot.stored() == BEFORE
    assert await bot.stored(HISTORY) == (None, {})
    await bot.assert_free()


async def test_a_handler_that_is_cancelled_leaves_nothing_and_frees_the_lock(bot: Bot) -> None:
    async def handle() -> None:
        async with bot.update():
            await bot.storage.set_state(KEY, "cancelled")
            await asyncio.sleep(60)

    task = asyncio.ensure_future(handle())
    await until(lambda: bot.isolation.still_held(KEY))
    await give_way()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await bot.stored() == BEFORE
    await bot.assert_free()


async def test_a_cancellation_after_the_handler_has_returned_still_writes(bot: Bot) -> None:
    async def handle() -> None:
        async with bot.update():
            await bot.storage.set_state(KEY, "returned")
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.ensure_future(handle())
    assert await bot.stored() == ("returned", BEFORE[1])
    await bot.assert_free()


@pytest.mark.parametrize("decision", [SkipHandler, CancelHandler])
async def test_decisions_are_no_failures_and_write(bot: Bot, decision: type[Exception]) -> None:
    with pytest.raises(decision):
        async with bot.update():
            await bot.storage.set_state(KEY, "decided")
            raise decision
    assert await bot.stored() == ("decided", BEFORE[1])
    await bot.assert_free()


# With what others write meanwhile


async def test_an_update_of_fields_keeps_those_that_others_change_meanwhile(bot: Bot) -> None:
    async with bot.update():
        assert await bot.storage.get_data(KEY) == BEFORE[1]
        await bot.meanwhile("update_data", {"paid": True, "name": "Eve"})
        await bot.meanwhile("set_state", "Form:paid")
        await bot.storage.update_data(KEY, {"age": 36})
        await bot.storage.update_data(KEY, {"age": 37})
        await bot.meanwhile("update_data", {"age": 1, "late": True})
    fields = {"name": "Eve", "seen": [1], "paid": True, "age": 37, "late": True}
    assert await bot.stored() == ("Form:paid", fields)


async def test_replacing_the_data_replaces_what_others_have_written_but_not_the_state(
    bot: Bot,
) -> None:
    async with bot.update():
        await bot.storage.set_data(KEY, {"new": 1})
        await bot.meanwhile("update_data", {"paid": True})
        await bot.meanwhile("set_state", "Form:paid")
        await bot.storage.update_data(KEY, {"newer": 2})
    assert await bot.stored() == ("Form:paid", {"new": 1, "newer": 2})


async def test_a_row_that_others_make_meanwhile_is_no_end_of_it(bot: Bot) -> None:
    async with bot.update():
        await bot.storage.update_data(HISTORY, {"mine": 1})
        await bot.storage.set_state(KEY, "Form:age")
        await bot.meanwhile("update_data", {"theirs": 2}, key=HISTORY)
    assert await bot.stored(HISTORY) == (None, {"theirs": 2, "mine": 1})
    assert await bot.stored() == ("Form:age", BEFORE[1])


async def test_a_conversation_that_is_cleared_meanwhile_gets_none_of_its_old_fields_back(
    bot: Bot,
) -> None:
    async with bot.update():
        await bot.storage.update_data(KEY, {"age": 36})
        await bot.meanwhile("clear")
    assert await bot.stored() == (None, {"age": 36})


async def test_a_conversation_that_was_only_read_stays_cleared(bot: Bot) -> None:
    async with bot.update():
        assert await bot.storage.get_data(KEY) == BEFORE[1]
        await bot.storage.update_data(KEY, {"name": "Ada"})  # what it is already
        await bot.storage.set_state(HISTORY, "else")
        await bot.meanwhile("clear")
    assert await bot.stored() == (None, {})


# Bad input


@pytest.mark.parametrize("backend", [*POSTGRESQL, *MARIADB], ids=str)
async def test_what_the_database_cannot_hold_is_refused_at_the_call(
    bot: Bot, backend: Backend
) -> None:
    """At the end of the update, nobody would know which call it was, and all would be lost."""
    packet = 0
    if backend.server == "mariadb":
        packet = await bot.storage.run_sync(
            lambda session: session.scalar(text("SELECT @@max_allowed_packet"))
        )
    async with bot.update():
        await bot.storage.update_data(KEY, {"kept": True})
        if backend.server == "postgresql":
            with pytest.raises(ValueError, match="NUL"):
                await bot.storage.set_state(KEY, "Form:\0")
        else:
            with pytest.raises(ValueError, match="max_allowed_packet"):
                await bot.storage.update_data(KEY, {"file": "x" * packet})
        await bot.storage.update_data(KEY, {"large": "x" * 200_000})
    assert await bot.stored() == (
        "Form:name",
        {**BEFORE[1], "kept": True, "large": "x" * 200_000},
    )
