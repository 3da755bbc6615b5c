"""Calls at once: no write is lost, no row is left over, nothing fails, on every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from dataclasses import replace

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import Backend
from blocking import sqlite_without_fsync
from conftest import Open, rows

from hybrid_storage import SQLAlchemyStorage

RACES = 100


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    """Do not wait for the disk: this is about other things."""
    with sqlite_without_fsync():
        yield


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    """Return a storage that tries again only where it must: MariaDB ends deadlocks by an error."""
    opened = await open_storage(backend, retry_for=30 if backend.server == "mariadb" else 0)
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


async def at_once(*calls: Awaitable[object]) -> list[object]:
    """Make calls at the same time."""
    return list(await asyncio.gather(*calls))


@pytest.mark.parametrize("fresh", [False, True], ids=["existing row", "fresh row"])
async def test_no_field_is_lost_of_many_set_at_once(
    storage: SQLAlchemyStorage, fresh: bool, key: StorageKey
) -> None:
    if not fresh:
        await storage.set_state(key, "waiting")
        await storage.set_data(key, {"name": "Ada"})
    results = await at_once(*(storage.update_data(key, {str(n): n}) for n in range(50)))
    expected = {str(n): n for n in range(50)} | ({} if fresh else {"name": "Ada"})
    assert await storage.get_data(key) == expected
    assert await storage.get_state(key) == (None if fresh else "waiting")
    for number, result in enumerate(results):
        assert isinstance(result, dict)
        assert result.items() <= expected.items()
        assert result[str(number)] == number


async def test_the_same_field_set_by_many_at_once_has_a_value_of_theirs(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    results = await at_once(*(storage.update_data(key, {"n": n}) for n in range(50)))
    assert results == [{"n": n} for n in range(50)]
    assert await storage.get_value(key, "n") in range(50)


async def test_first_writes_of_state_and_data_are_both_kept(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    for number in range(RACES):
        fresh = replace(key, chat_id=number)
        await at_once(
            storage.set_state(fresh, "waiting"), storage.set_data(fresh, {"number": number})
        )
    for number in range(RACES):
        fresh = replace(key, chat_id=number)
        assert await storage.get_state(fresh) == "waiting"
        assert await storage.get_data(fresh) == {"number": number}


@pytest.mark.parametrize("kept", ["state", "data"])
async def test_what_is_set_is_kept_while_the_rest_is_removed(
    storage: SQLAlchemyStorage, kept: str, key: StorageKey
) -> None:
    for number in range(RACES // 4):
        await at_once(storage.set_state(key, "waiting"), storage.set_data(key, {"name": "Ada"}))
        if kept == "data":
            new: tuple[object, object] = (None, {"number": number})
            await at_once(storage.set_state(key, None), storage.set_data(key, {"number": number}))
        else:
            new = (str(number), {})
            await at_once(storage.set_state(key, str(number)), storage.set_data(key, {}))
        assert (await storage.get_state(key), await storage.get_data(key)) == new


async def test_no_row_is_left_when_state_and_data_are_removed_at_once(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    for _ in range(RACES // 4):
        await at_once(storage.set_state(key, "waiting"), storage.set_data(key, {"name": "Ada"}))
        await at_once(storage.set_state(key, None), storage.set_data(key, {}))
        assert await rows(storage) == []


async def test_writes_of_every_kind_to_one_key_do_not_fail_each_other(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    for number in range(5):
        await at_once(
            *(storage.update_data(key, {str(n): n}) for n in range(4)),
            storage.clear(key),
            storage.set_state(key, None),
            storage.set_data(key, {}),
            storage.set_state(key, "waiting"),
            storage.set_data(key, {"number": number}),
            storage.get_data(key),
            storage.get_state(key),
        )
    await at_once(storage.set_state(key, "done"), storage.set_data(key, {"number": 10}))
    assert await storage.get_state(key) == "done"
    assert await storage.get_data(key) == {"number": 10}


async def test_conversations_at_once_keep_apart(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    async def converse(number: int) -> None:
        mine = replace(key, chat_id=number)
        await storage.set_state(mine, "waiting")
        await storage.update_data(mine, {"number": number})
        await storage.update_data(mine, {"done": True})
        await storage.set_state(mine, None)
        assert await storage.get_data(mine) == {"number": number, "done": True}
        await storage.clear(mine)

    await at_once(*(converse(number) for number in range(40)))
    assert await rows(storage) == []
