"""What finding, changing and expiring conversations must not do to what is beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import StorageKey
from backends import Backend
from conftest import Open, engine_of
from sqlalchemy import create_engine, update
from sqlalchemy.orm import Session

from hybrid_storage import SQLAlchemyStorage

DAY = 86400.0


class Order(StatesGroup):
    """States of an order."""

    cart = State()


def key_of(user: int, **fields: Any) -> StorageKey:
    return replace(StorageKey(bot_id=42, chat_id=user, user_id=user), **fields)


def history_of(user: int, **fields: Any) -> StorageKey:
    return key_of(user, destiny="scenes_history", **fields)


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    """Return a storage whose table has the columns."""
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True)
    return storage


async def age(storage: SQLAlchemyStorage, seconds: float) -> None:
    """Make all rows older than they are."""
    table = storage.table

    def older(session: Session) -> None:
        values = {"written_at": table.c.written_at - seconds, "idle_handled": table.c.idle_handled}
        session.connection().execute(update(table).values(values))

    await storage.run_sync(older)


async def keys(storage: SQLAlchemyStorage, **filters: Any) -> list[StorageKey]:
    return [found.key async for found in storage.find(**filters)]


# Renamed states


HISTORY = {"history": [{"state": "Order:cart", "data": {}}]}


async def test_a_rename_lets_nothing_live_the_longer(backend: Backend, open_storage: Open) -> None:
    storage = await open_storage(backend, columns=True, expires_after=DAY)
    await storage.set_state(key_of(1), Order.cart)
    await storage.set_data(history_of(2), HISTORY)
    await age(storage, DAY / 2)
    await storage.rename_state("Order", "Purchase", is_group=True)
    assert await storage.get_state(key_of(1)) == "Purchase:cart"
    assert set(await keys(storage, idle_for=DAY / 3, destiny=None)) == {key_of(1), history_of(2)}
    await age(storage, DAY / 2)
    await storage.rename_state("Purchase", "Order", is_group=True)
    assert await storage.get_state(key_of(1)) is None
    assert await storage.get_data(history_of(2)) == {}


async def test_a_rename_in_data_keeps_what_is_written_meanwhile(
    backend: Backend, open_storage: Open
) -> None:
    writes: list[Any] = []

    def loads(text: str) -> Any:
        if writes:
            write = writes.pop()
            write()
        return json.loads(text)

    storage = await open_storage(backend, columns=True, json_loads=loads)
    await storage.set_data(history_of(1), HISTORY)
    url = engine_of(storage).url.set(
        drivername={"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}.get(
            backend.server, "mysql+pymysql"
        )
    )
    engine = create_engine(url)

    def write() -> None:
        changed = {"data": json.dumps({**HISTORY, "more": 1})}
        with engine.begin() as connection:
            connection.execute(update(storage.table).values(changed))

    writes.append(write)
    assert await storage.rename_state("Order", "Purchase", is_group=True) == 1
    engine.dispose()
    assert await storage.get_data(history_of(1)) == {
        "history": [{"state": "Purchase:cart", "data": {}}],
        "more": 1,
    }


async def test_groups_in_a_group_are_renamed_with_it_and_no_others(
    storage: SQLAlchemyStorage,
) -> None:
    states = ["a_b:x", "a_b.Sub:x", "a_b.Sub.Deep:x", "aXb:x", "A_B:x", r"a\_b:x", "a_bb:x", "a_b"]
    for number, state in enumerate(states):
        await storage.set_state(key_of(number), state)
        await storage.set_data(history_of(number), {"history": [{"state": state, "data": {}}]})
    assert await storage.rename_state("a_b", "a_b.New", is_group=True) == 6
    for number, state in enumerate(states):
        new = state.replace("a_b", "a_b.New") if number < 3 else state
        assert await storage.get_state(key_of(number)) == new
        assert (await storage.get_data(history_of(number)))["history"][0]["state"] == new
    assert await storage.rename_state(r"a\_b", "100%", is_group=True) == 2
    assert await storage.rename_state("100%", "new", is_group=True) == 2
    assert await storage.get_state(key_of(5)) == "new:x"
