"""``expires_after``: a conversation that was not written to for so long reads as absent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from blocking import statements
from conftest import Open, rows
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker
from units import HISTORY, KEY, Bot, running

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage

DAY = 86400.0
CONTEXT = replace(KEY, destiny="aiogd:context:abc")
OTHER = StorageKey(bot_id=42, chat_id=9, user_id=9)


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    """Return a storage with a conversation of several rows, and another one."""
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True, expires_after=DAY)
    await fill(storage)
    return storage


async def fill(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(KEY, "Form:name")
    await storage.set_data(KEY, {"name": "Ada"})
    await storage.set_data(HISTORY, {"history": []})
    await storage.set_data(CONTEXT, {"id": "abc"})
    await storage.set_state(OTHER, "Form:age")


async def age(storage: SQLAlchemyStorage, key: StorageKey | None = None) -> None:
    """Make rows a day older: all, or that of a key."""
    table = storage.table

    def older(session: Session) -> None:
        where = [] if key is None else [table.c.id == FullKeyBuilder().build(key)]
        values = {"written_at": table.c.written_at - DAY, "idle_handled": table.c.idle_handled}
        session.connection().execute(update(table).where(*where).values(values))

    await storage.run_sync(older)


async def read(storage: SQLAlchemyStorage) -> list[Any]:
    return [
        await storage.get_state(KEY),
        await storage.get_data(KEY),
        await storage.get_data(HISTORY),
        await storage.get_data(CONTEXT),
    ]


ALL = ["Form:name", {"name": "Ada"}, {"history": []}, {"id": "abc"}]
NOTHING: list[Any] = [None, {}, {}, {}]


async def test_all_rows_expire_together(storage: SQLAlchemyStorage) -> None:
    assert await read(storage) == ALL
    await age(storage)
    assert await read(storage) == NOTHING
    assert await storage.get_state(OTHER) is None
    assert await storage.count() == 0
    assert [found async for found in storage.find(destiny=None)] == []
    assert (await storage.conversation(KEY)).state is None


async def test_a_row_that_is_not_touched_lives_as_long_as_its_conversation(
    storage: SQLAlchemyStorage,
) -> None:
    for key in (KEY, HISTORY):
        await age(storage, key)
    assert await read(storage) == ALL
    await age(storage, CONTEXT)
    assert await read(storage) == NOTHING


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda storage: storage.set_state(KEY, "new"), ["new", {}, {}, {}]),
        (lambda storage: storage.set_state(KEY, None), NOTHING),
        (lambda storage: storage.set_data(KEY, {"a": 1}), [None, {"a": 1}, {}, {}]),
        (lambda storage: storage.set_data(KEY, {}), NOTHING),
        (lambda storage: storage.update_data(KEY, {"a": 1}), [None, {"a": 1}, {}, {}]),
        (lambda storage: storage.set_data(HISTORY, {"a": 1}), [None, {}, {"a": 1}, {}]),
        (lambda storage: storage.clear(KEY), NOTHING),
        (lambda storage: storage.remove_data(KEY, "name"), NOTHING),
    ],
    ids=["set_state", "no state", "set_data", "no data", "update", "history", "clear", "remove"],
)
async def test_a_write_brings_nothing_back(
    storage: SQLAlchemyStorage, write: Any, expected: list[Any]
) -> None:
    await age(storage)
    await write(storage)
    assert await read(storage) == expected
    assert await storage.get_state(OTHER) is None


@pytest.mark.parametrize("lease", [30.0, None], ids=["lease", "this process"])
@pytest.mark.parametrize("key", [KEY, HISTORY], ids=["main row", "history"])
async def test_an_update_begins_anew(
    open_storage: Open, backend: Backend, lease: float | None, key: StorageKey
) -> None:
    storage = await open_storage(backend, columns=True, expires_after=DAY)
    async with running(storage, lease) as bot:
        await fill(storage)
        await update_of(bot, KEY, {"name": "Ada"})  # the next is expected to read what this read
        await age(storage)
        await update_of(bot, key, {"new": True})
        assert [await storage.get_data(each) for each in (KEY, HISTORY, CONTEXT)] == [
            {"new": True} if each == key else {} for each in (KEY, HISTORY, CONTEXT)
        ]


async def update_of(bot: Bot, key: StorageKey, data: dict[str, Any]) -> None:
    async with bot.update(key):
        await bot.storage.get_data(HISTORY)
        await bot.storage.update_data(key, data)


async def test_a_read_takes_no_more_than_it_did(open_storage: Open) -> None:
    storage = await open_storage(POSTGRESQL[2], columns=True, expires_after=DAY)
    async with running(storage, 30.0) as bot:
        with statements() as seen:
            await storage.get_state(KEY)
        assert len(seen) == 1
        with statements() as seen:
            async with bot.update(KEY):
                await storage.update_data(KEY, {"a": 1})
        assert len(seen) == 2


async def test_what_has_expired_is_purged_in_batches(
    storage: SQLAlchemyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_storage._steps.PAGE", 2)
    assert await storage.purge() == 0
    await age(storage)
    await storage.set_state(StorageKey(42, 1, 1), "alive")
    assert len(await rows(storage)) == 5
    async with anyio.create_task_group() as group:  # two processes do
        group.start_soon(storage.purge)
        group.start_soon(storage.purge)
    assert [row[1] for row in await stored_states(storage)] == ["alive"]


async def stored_states(storage: SQLAlchemyStorage) -> list[tuple[Any, ...]]:
    names = storage.table.columns.keys()
    return [(row[names.index("id")], row[names.index("state")]) for row in await rows(storage)]


async def test_rows_without_a_time_do_not_expire(open_storage: Open, backend: Backend) -> None:
    storage = await open_storage(backend, columns=True, expires_after=DAY)
    await fill(storage)
    table = storage.table

    def forget(session: Session) -> None:
        values = {"written_at": None, "conversation": None}
        session.connection().execute(update(table).values(values))

    await storage.run_sync(forget)
    assert await read(storage) == ALL
    assert await storage.fill_columns() == 4
    await age(storage)
    assert await read(storage) == ALL
    assert await storage.purge() == 0


async def test_without_an_expiry_there_is_nothing_to_purge(open_storage: Open) -> None:
    storage = await open_storage(POSTGRESQL[0], columns=True)
    with pytest.raises(ValueError, match="expires_after"):
        await storage.purge()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [("1 day", TypeError, "seconds"), (0, ValueError, "above 0"), (-1, ValueError, "0 or more")],
)
def test_an_expiry_is_a_number_of_seconds(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SQLAlchemyStorage(sessionmaker(), columns=True, expires_after=wrong)
