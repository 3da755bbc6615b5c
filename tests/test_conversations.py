"""Find, count and change conversations, on each backend, awaited and in a session of one's own."""

from __future__ import annotations

import asyncio
import os
import sys
import tracemalloc
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import anyio
import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from backends import POSTGRESQL, Backend
from blocking import listening
from conftest import Open, engine_of
from sqlalchemy import func, insert, literal, select, text, update
from sqlalchemy.orm import Session, sessionmaker
from units import running

from hybrid_storage import SQLAlchemyStorage

ROWS = int(os.environ.get("HYBRID_STORAGE_ROWS", "100000"))
"""1,000,000 for the figures of docs/guides/conversations.md."""


class Order(StatesGroup):
    """States of an order."""

    cart = State()
    payment = State()


class Purchase(StatesGroup):
    """The same under another name."""

    cart = State()
    payment = State()


def key_of(user: int, **fields: Any) -> StorageKey:
    return replace(StorageKey(bot_id=42, chat_id=user, user_id=user), **fields)


def history_of(user: int) -> StorageKey:
    return key_of(user, destiny="scenes_history")


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    """Return a storage whose table has the columns, with five users in it."""
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True)
    for user in range(1, 6):
        await storage.set_state(key_of(user), Order.payment if user % 2 else Order.cart)
        await storage.set_data(key_of(user), {"user": user})
    await storage.set_data(history_of(1), {"history": [{"state": "Order:cart", "data": {}}]})
    return storage


async def idle(storage: SQLAlchemyStorage, seconds: float, **columns: Any) -> None:
    """Make rows older than they are."""
    table = storage.table

    def age(session: Session) -> None:
        where = [table.c[name] == value for name, value in columns.items()]
        older = {"written_at": table.c.written_at - seconds, "idle_handled": table.c.idle_handled}
        session.connection().execute(update(table).where(*where).values(older))

    await storage.run_sync(age)


async def users(storage: SQLAlchemyStorage, **filters: Any) -> list[int]:
    return [found.key.user_id async for found in storage.find(**filters)]


# Find and count


async def test_what_is_found_has_its_key_its_state_its_data_and_its_time(
    storage: SQLAlchemyStorage,
) -> None:
    [found] = [each async for each in storage.find(user_id=3)]
    assert found.key == key_of(3)
    assert found.state == "Order:payment"
    assert found.data == {"user": 3}
    assert found.written_at is not None
    assert abs(datetime.now(timezone.utc) - found.written_at) < timedelta(minutes=5)
    assert await storage.conversation(key_of(3)) == found
    nobody = await storage.conversation(key_of(9))
    assert (nobody.state, nobody.data, nobody.written_at) == (None, {}, None)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"state": Order.payment}, [1, 3, 5]),
        ({"state": "Order:cart"}, [2, 4]),
        ({"state": Order}, [1, 2, 3, 4, 5]),
        ({"state": [Order.cart, "unknown"]}, [2, 4]),
        ({"state": Purchase}, []),
        ({"chat_id": 2}, [2]),
        ({"bot_id": 42, "user_id": 1}, [1]),
        ({"bot_id": 43}, []),
        ({"user_id": 1, "destiny": None}, [1, 1]),
        ({"destiny": "scenes_history"}, [1]),
        ({"thread_id": None}, [1, 2, 3, 4, 5]),
        ({"thread_id": 5}, []),
        ({"idle_for": 3600.0}, []),
        ({"idle_for": 0}, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
async def test_conversations_are_found_by_what_is_known_of_them(
    storage: SQLAlchemyStorage, filters: Any, expected: list[int]
) -> None:
    assert sorted(await users(storage, **filters)) == expected
    assert await storage.count(**filters) == len(expected)

    def in_a_session(session: Session) -> tuple[list[int], int]:
        found = storage.operations.find(session, **filters)
        return sorted(each.key.user_id for each in found), storage.operations.count(
            session, **filters
        )

    assert await storage.run_sync(in_a_session) == (expected, len(expected))


async def test_a_conversation_is_idle_when_nothing_of_it_was_written(
    storage: SQLAlchemyStorage,
) -> None:
    await idle(storage, 7200)
    await storage.set_data(history_of(1), {"history": []})
    await storage.update_data(key_of(2), {})  # no change, and no write
    assert sorted(await users(storage, idle_for=3600)) == [2, 3, 4, 5]
    await storage.update_data(key_of(2), {"user": 2})  # no change, but a write
    assert sorted(await users(storage, idle_for=3600, state=Order)) == [3, 4, 5]
    assert await users(storage, idle_for=10_000) == []


async def test_pages_follow_each_other_and_miss_nothing(
    storage: SQLAlchemyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_storage._steps.PAGE", 2)
    for filters in ({}, {"state": Order}, {"idle_for": 0.0}):
        assert sorted(await users(storage, **filters)) == [1, 2, 3, 4, 5]
    assert await storage.change_states("seen", state=Order) == 5
    assert await storage.count(state="seen") == 5


async def test_states_are_counted(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(key_of(5), None)
    assert await storage.count_by_state() == {"Order:payment": 2, "Order:cart": 2, None: 1}
    assert await users(storage, state=None) == [5]


@pytest.mark.parametrize("lease", [30.0, None], ids=["lease", "this process"])
async def test_units_of_work_fill_the_columns(
    open_storage: Open, backend: Backend, lease: float | None
) -> None:
    storage = await open_storage(backend, columns=True)
    async with running(storage, lease) as bot:
        key = key_of(8, thread_id=5, business_connection_id="b:1")
        for number in range(2):  # rows that are new, and rows that are not
            async with bot.update(key):
                await bot.storage.set_state(key, f"state {number}")
                await bot.storage.set_data(replace(key, destiny="dialog"), {"number": number})
        found = [each async for each in storage.find(user_id=8, destiny=None)]
        assert {each.key for each in found} == {key, replace(key, destiny="dialog")}
        assert {each.state for each in found} == {"state 1", None}


class Reversed(KeyBuilder):
    """A key builder that nobody can parse."""

    def build(self, key: StorageKey, part: Any = None) -> str:
        return f"{key.user_id}/{key.chat_id}/{key.bot_id}/{key.destiny}"[::-1]


async def test_any_key_builder_will_do(open_storage: Open, backend: Backend) -> None:
    storage = await open_storage(backend, columns=True, key_builder=Reversed())
    await storage.set_state(key_of(7), Order.cart)
    await storage.set_data(key_of(7), {})
    assert [each.key async for each in storage.find(state=Order.cart)] == [key_of(7)]


# On a table without the columns


async def test_without_the_columns_it_says_what_to_do(open_storage: Open, backend: Backend) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend)
    with pytest.raises(ValueError, match=r"find\(\) needs the columns .* columns=True"):
        await users(storage)
    for call in (
        storage.count(),
        storage.forget_user(7),
        storage.clear_all(user_id=7),
        storage.rename_state(Order, Purchase),
        storage.purge(),
        storage.fill_columns(),
    ):
        with pytest.raises(ValueError, match="needs the columns"):
            await call
    with pytest.raises(ValueError, match="expires_after needs the columns"):
        SQLAlchemyStorage(sessionmaker(), expires_after=60)


async def test_rows_from_before_the_columns_are_filled_and_keep_what_they_hold(
    open_storage: Open, backend: Backend
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True)
    table = storage.table
    values: list[dict[str, Any]] = [
        {"id": "42:7:7", "state": "Order:cart", "data": '{"a": 1}'},
        {"id": "42:7:7:destiny=scenes_history", "state": None, "data": "{}"},
        {"id": "somebody else's", "state": "Order:cart", "data": None},
    ]
    empty: dict[str, Any] = {column.name: None for column in table.columns}
    rows = [{**empty, **each} for each in values]
    await storage.run_sync(
        lambda session: session.connection().execute(insert(table), rows) and None
    )
    assert await users(storage) == []
    assert await storage.fill_columns() == 2
    assert await storage.fill_columns() == 0
    [found] = [each async for each in storage.find()]
    assert (found.key, found.data, found.written_at) == (key_of(7), {"a": 1}, None)
    assert await users(storage, idle_for=0) == []  # nobody knows
    await storage.set_state(key_of(7), Order.payment)
    assert (await storage.conversation(key_of(7))).written_at is not None


async def test_the_time_of_rows_that_are_filled_may_begin_now(
    open_storage: Open, backend: Backend
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend, columns=True)
    table = storage.table
    row: dict[str, Any] = {**dict.fromkeys(table.columns.keys()), "id": "42:7:7", "state": "x"}
    await storage.run_sync(
        lambda session: session.connection().execute(insert(table), row) and None
    )
    assert await storage.fill_columns(written_now=True) == 1
    assert await users(storage, idle_for=0) == [7]
    assert await users(storage, idle_for=3600) == []


@pytest.mark.parametrize(
    "wrong", [{"user_id": [1, 2]}, {"chat_id": "7"}, {"user_id": None}, {"destiny": 3}], ids=str
)
async def test_a_filter_is_one_value_of_its_type(storage: SQLAlchemyStorage, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"finds by one {next(iter(wrong))}, of type"):
        await storage.count(**wrong)


# One atomically


async def test_fields_that_tasks_remove_are_all_gone(storage: SQLAlchemyStorage) -> None:
    names = [f"field {number}" for number in range(12)]
    await storage.set_data(key_of(1), {**dict.fromkeys(names, 1), "rest": True})
    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(storage.remove_data, key_of(1), name, "not there")
    assert await storage.get_data(key_of(1)) == {"rest": True}


async def test_data_are_changed_by_a_function(storage: SQLAlchemyStorage) -> None:
    def count(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "n": data.get("n", 0) + 1}

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(storage.change_data, key_of(9), count)
    assert await storage.get_data(key_of(9)) == {"n": 10}
    assert await storage.change_data(key_of(9), lambda data: {}) == {}
    found = await storage.conversation(key_of(9))
    assert found.written_at is None, "an empty row is left"

    def in_a_session(session: Session) -> dict[str, Any]:
        storage.operations.change_data(session, key_of(9), count)
        return storage.operations.remove_data(session, key_of(9), "other")

    assert await storage.run_sync(in_a_session) == {"n": 1}


async def test_a_unit_of_work_collects_such_changes(open_storage: Open, backend: Backend) -> None:
    async with running(await open_storage(backend), None) as bot:
        key = key_of(7)
        async with bot.update(key):
            await bot.storage.set_data(key, {"a": 1, "b": 2})
            assert await bot.storage.remove_data(key, "a") == {"b": 2}
            await bot.storage.change_data(key, lambda data: {**data, "c": 3})
        assert (await bot.stored(key))[1] == {"b": 2, "c": 3}


@pytest.mark.parametrize("wrong", ["n", None, 3])
async def test_a_change_is_a_function(storage: SQLAlchemyStorage, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"change_data\(\) takes a function"):
        await storage.change_data(key_of(1), wrong)
    with pytest.raises(TypeError, match=r"remove_data\(\) takes names"):
        await storage.remove_data(key_of(1), 7)  # type: ignore[arg-type]


# Many at a time


async def test_states_are_changed_and_conversations_cleared(storage: SQLAlchemyStorage) -> None:
    assert await storage.change_states(Order.cart, state=Order.payment) == 3
    assert await storage.count_by_state() == {"Order:cart": 5}
    assert await storage.change_states(None, user_id=2) == 1
    assert await storage.clear_all(state=Order.cart, user_id=1) == 1
    assert await users(storage, user_id=1, destiny=None) == []  # the scenes' history is gone, too
    assert await storage.get_data(key_of(2)) == {"user": 2}
    with pytest.raises(ValueError, match="every conversation"):
        await storage.clear_all()
    with pytest.raises(TypeError, match="not by 'states'"):
        await storage.clear_all(states="Order:cart")  # type: ignore[call-arg]


async def test_a_group_is_renamed_wherever_it_stands(storage: SQLAlchemyStorage) -> None:
    context = key_of(1, destiny="aiogd:context:abc")
    await storage.set_data(context, {"id": "abc", "state": "Order:payment", "dialog_data": {}})
    await storage.set_state(key_of(8), "Orders:cart")  # of another group
    assert await storage.rename_state(Order, Purchase) == 7
    assert await storage.rename_state(Order, Purchase) == 0
    assert await storage.count(state=Purchase) == 5
    assert await storage.get_state(key_of(8)) == "Orders:cart"
    assert (await storage.get_data(history_of(1)))["history"][0]["state"] == "Purchase:cart"
    assert (await storage.get_data(context))["state"] == "Purchase:payment"
    assert await storage.rename_state("Purchase:cart", Order.cart) == 3
    assert await storage.count(state=Order.cart) == 2
    assert await storage.rename_state("Purchase", "Order", is_group=True) == 4
    with pytest.raises(TypeError, match="two states, two groups"):
        await storage.rename_state(Order, None)  # type: ignore[arg-type]


async def test_a_user_is_forgotten_everywhere(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(key_of(1, chat_id=-100), "in a group")
    await storage.set_state(key_of(1, bot_id=43), "with another bot")
    assert await storage.forget_user(1, bot_id=42) == 3
    assert await users(storage, user_id=1, destiny=None) == [1]
    assert await storage.forget_user(1) == 1
    assert sorted(await users(storage)) == [2, 3, 4, 5]


async def test_a_chat_moves_with_all_that_is_in_it(storage: SQLAlchemyStorage) -> None:
    old, new = -7, -1007
    await storage.set_state(key_of(1, chat_id=old), "first")
    await storage.set_data(key_of(1, chat_id=old, destiny="scenes_history"), {"history": []})
    await storage.set_state(key_of(2, chat_id=old), "left behind")
    await storage.set_state(key_of(2, chat_id=new), "began anew")
    await storage.set_state(StorageKey(42, old, old), "of the whole chat")
    assert await storage.move_chat(old, new) == 3
    assert await storage.move_chat(old, new) == 0
    assert await users(storage, chat_id=old, destiny=None) == []
    assert await storage.get_state(key_of(1, chat_id=new)) == "first"
    assert await storage.get_state(key_of(2, chat_id=new)) == "began anew"
    assert await storage.get_state(StorageKey(42, new, new)) == "of the whole chat"


async def test_bulk_changes_keep_what_others_write_meanwhile(storage: SQLAlchemyStorage) -> None:
    """Each task counts in its user's data, while states are renamed to and fro."""
    done = False

    async def count(user: int) -> None:
        for _ in range(15):
            await storage.change_data(
                key_of(user), lambda data: {**data, "n": data.get("n", 0) + 1}
            )

    async def rename() -> None:
        names = [Order, Purchase]
        while not done:
            await storage.rename_state(*names)
            await storage.change_states("seen", user_id=5)
            names.reverse()

    renaming = asyncio.create_task(rename())
    async with anyio.create_task_group() as group:
        for user in range(1, 6):
            group.start_soon(count, user)
    done = True
    await renaming
    assert [(await storage.get_data(key_of(user)))["n"] for user in range(1, 6)] == [15] * 5


async def test_a_handler_that_forgets_its_user_leaves_nothing(
    open_storage: Open, backend: Backend
) -> None:
    async with running(await open_storage(backend, columns=True), None) as bot:
        async with bot.update(key_of(7)):
            await bot.storage.update_data(key_of(7), {"a": 1})
            await bot.storage.forget_user(7)
            assert await bot.storage.get_data(key_of(7)) == {}
        assert await users(bot.storage, destiny=None) == []


# Many rows


async def test_the_first_page_of_many_rows_comes_at_once(
    open_storage: Open, capfd: pytest.CaptureFixture[str]
) -> None:
    """By an index, whatever is looked for: by PostgreSQL's own measure."""
    storage = await open_storage(POSTGRESQL[0], columns=True)
    table = storage.table
    engine = engine_of(storage)
    number = func.generate_series(1, ROWS).column_valued("number")
    fields: dict[str, Any] = {
        "id": literal("42:").concat(number).concat(":").concat(number),
        "state": literal("Form:").concat(number % 50),
        "data": literal('{"name": "Ada"}'),
        "bot_id": literal(42),
        "chat_id": number,
        "user_id": number,
        "destiny": literal("default"),
        "conversation": literal("42:").concat(number).concat(":").concat(number),
        "written_at": literal(1_700_000_000.0) + number,
        "idle_handled": literal(0.0),
    }
    with engine.begin() as connection:
        connection.execute(
            insert(table).from_select(
                list(fields), select(*fields.values()), include_defaults=False
            )
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM ANALYZE {table.name}"))
    looks: list[dict[str, Any]] = [
        {"state": "Form:7"},
        {"user_id": ROWS // 2},
        {"chat_id": ROWS // 2},
        {"idle_for": 3600.0},
        {"state": "Form:7", "idle_for": 3600.0},
        {},
    ]
    for filters in looks:
        seen: list[tuple[str, Any]] = []
        with listening(engine, seen):
            async for _ in storage.find(**filters):
                break
        [(statement, parameters)] = seen
        with engine.connect() as connection:
            explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
            connection.exec_driver_sql(explain, parameters)
            [plan] = connection.exec_driver_sql(explain, parameters).scalar_one()
        if "HYBRID_STORAGE_ROWS" in os.environ:
            with capfd.disabled():
                sys.stdout.write(f"\n{filters} of {ROWS:,} rows: {plan['Execution Time']:.2f} ms")
        assert "Seq Scan" not in str(plan)
        assert plan["Execution Time"] < 100  # 10 is promised, of a machine that is quiet

    tracemalloc.start()
    number_found = 0
    async for _ in storage.find():
        number_found += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number_found == ROWS
    assert peak < 10_000_000  # bytes: a page or two, and by far not all rows
