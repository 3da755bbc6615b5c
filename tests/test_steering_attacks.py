"""What finding, changing and expiring conversations must not do to what is beside them."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from typing import Any

import anyio
import pytest
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from backends import MARIADB, POSTGRESQL, Backend
from conftest import Open, engine_of, rows
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Dialect,
    Engine,
    MetaData,
    String,
    TypeDecorator,
    create_engine,
    delete,
    insert,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from test_encrypted_data import Encrypted
from units import BEFORE, KEY, running

from hybrid_storage import ConversationColumns, FSMData, SQLAlchemyStorage
from hybrid_storage._sql.limits import Limits
from hybrid_storage.model import table_of

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


def sync_engine(storage: SQLAlchemyStorage, backend: Backend) -> Engine:
    """Return another engine of the same database, for what happens meanwhile."""
    names = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mariadb": "mysql+pymysql"}
    return create_engine(engine_of(storage).url.set(drivername=names[backend.server]))


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
    engine = sync_engine(storage, backend)

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


# Cleared conversations


async def test_a_user_who_is_in_a_dialog_alone_is_reset(storage: SQLAlchemyStorage) -> None:
    """aiogram-dialog keeps all it has under destinies of its own."""
    await storage.set_data(key_of(1, destiny="aiogd:context:abc"), {"id": "abc"})
    await storage.set_data(key_of(1, destiny="aiogd:stack:"), {"intents": ["abc"]})
    await storage.set_state(key_of(2), Order.cart)
    await storage.set_data(history_of(2), HISTORY)
    assert await storage.clear_all(user_id=1) == 1
    assert await keys(storage, user_id=1, destiny=None) == []
    await age(storage, DAY)
    assert await storage.clear_all(idle_for=DAY) == 1
    assert await rows(storage) == []


async def test_clearing_leaves_the_dialog_of_a_user_who_has_left_the_state(
    backend: Backend, open_storage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user does so between the look and the deletion."""
    storage = await open_storage(backend, columns=True)
    dialog = key_of(1, destiny="aiogd:context:abc")
    await storage.set_state(key_of(1), Order.cart)
    await storage.set_data(dialog, {"id": "abc"})
    sql = storage._steps._sql
    page, table = sql.page, storage.table

    def page_then_leave(connection: Any, *arguments: Any) -> Any:
        found = page(connection, *arguments)
        with engine.begin() as other:
            other.execute(delete(table).where(table.c.destiny == "default"))
        return found

    engine = sync_engine(storage, backend)
    monkeypatch.setattr(sql, "page", page_then_leave)
    assert await storage.clear_all(state=Order.cart) == 0
    engine.dispose()
    assert await storage.get_data(dialog) == {"id": "abc"}


async def test_all_destinies_are_no_filter_for_a_change(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(key_of(1), Order.cart)
    for call in (storage.clear_all(destiny=None), storage.change_states("new", destiny=None)):
        with pytest.raises(ValueError, match="every conversation"):
            await call
    assert await storage.get_state(key_of(1)) == "Order:cart"


async def test_rows_of_which_nothing_is_known_are_left_alone(storage: SQLAlchemyStorage) -> None:
    """They are of before the columns, and may well be in a topic."""
    table = storage.table
    row: dict[str, Any] = {column.name: None for column in table.columns}
    row |= {"id": "42:7:7:thread_id=5", "state": "Order:cart"}
    await storage.run_sync(
        lambda session: session.connection().execute(insert(table), row) and None
    )
    everywhere: dict[str, Any] = {"thread_id": None, "destiny": None}
    assert await keys(storage, **everywhere) == []
    assert await storage.count(**everywhere) == 0
    assert await storage.change_states("new", **everywhere) == 0
    assert await storage.clear_all(**everywhere) == 0
    assert await storage.clear_all(state=Order.cart, destiny=None) == 0
    assert await storage.get_state(key_of(7, thread_id=5)) == "Order:cart"


# Pages


async def test_what_is_written_meanwhile_is_not_found_once_more(
    storage: SQLAlchemyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_storage._steps.PAGE", 2)
    for user in range(5):
        await storage.set_state(key_of(user), Order.cart)
    seen: list[int] = []
    with anyio.fail_after(20):
        async for found in storage.find(idle_for=0):
            seen.append(found.key.user_id)
            await storage.update_data(found.key, {"told": True})
        assert seen == list(range(5))
        assert await storage.change_states("new", idle_for=0) == 5


# Chats that move


OLD, NEW = -7, -1007


async def test_of_two_conversations_one_stays_as_a_whole(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(key_of(1, chat_id=OLD), Order.cart)
    await storage.set_data(history_of(1, chat_id=OLD), HISTORY)
    await storage.set_state(key_of(1, chat_id=NEW), "began anew")
    await storage.set_data(history_of(2, chat_id=OLD), HISTORY)
    await storage.set_state(key_of(2, chat_id=OLD), Order.cart)
    assert await storage.move_chat(OLD, NEW) == 2
    assert await storage.get_state(key_of(1, chat_id=NEW)) == "began anew"
    assert await storage.get_data(history_of(1, chat_id=NEW)) == {}
    assert await storage.get_data(history_of(2, chat_id=NEW)) == HISTORY
    assert len(await rows(storage)) == 3


async def test_what_has_expired_in_the_new_chat_is_not_there(
    backend: Backend, open_storage: Open
) -> None:
    storage = await open_storage(backend, columns=True, expires_after=DAY)
    await storage.set_state(key_of(1, chat_id=NEW), "long ago")
    await storage.set_data(history_of(1, chat_id=NEW), HISTORY)
    await age(storage, DAY)
    await storage.set_state(key_of(1, chat_id=OLD), Order.cart)
    assert await storage.move_chat(OLD, NEW) == 1
    assert await storage.get_state(key_of(1, chat_id=NEW)) == "Order:cart"
    assert await storage.get_data(history_of(1, chat_id=NEW)) == {}


async def test_a_move_is_rolled_back_with_the_session(storage: SQLAlchemyStorage) -> None:
    await storage.set_state(key_of(1, chat_id=OLD), Order.cart)

    def move(session: Session) -> None:
        assert storage.operations.move_chat(session, OLD, NEW) == 1
        session.rollback()

    await storage.run_sync(move)
    assert await keys(storage) == [key_of(1, chat_id=OLD)]


async def test_a_move_that_the_table_refuses_deletes_nothing(
    backend: Backend, open_storage: Open
) -> None:
    class Base(DeclarativeBase):
        pass

    class Model(ConversationColumns, FSMData, Base):
        __tablename__ = "fsm_of_small_chats"
        __table_args__ = (CheckConstraint(f"chat_id > {NEW}"),)

    storage = await open_storage(backend, table_name=Model)
    await storage.set_state(key_of(1, chat_id=OLD), Order.cart)
    with pytest.raises(DBAPIError):
        await storage.move_chat(OLD, NEW)
    assert await storage.get_state(key_of(1, chat_id=OLD)) == "Order:cart"


# Units of work


class Negative(TypeDecorator[int]):
    """A type of the application's own, which hides whom a row is of."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else -value

    process_result_value = process_bind_param


@pytest.mark.parametrize("by_driver", [False, True], ids=["core", "driver"])
@pytest.mark.parametrize("what", ["data", "user_id"])
async def test_units_of_work_know_the_columns_types(
    backend: Backend, open_storage: Open, what: str, by_driver: bool
) -> None:
    class Base(DeclarativeBase):
        pass

    types: dict[str, Any] = {"data": Encrypted, "user_id": Negative}
    column = {what: mapped_column(types[what], nullable=True)}
    table_name = f"fsm_{uuid.uuid4().hex}"
    bases = (ConversationColumns, FSMData, Base)
    model = type("Model", bases, {"__tablename__": table_name, **column})
    storage = await open_storage(backend, table_name=model)
    async with running(storage, 30.0, driver_statements=by_driver) as bot:
        for number in range(2):
            async with bot.update(KEY):
                await storage.update_data(KEY, {"number": number})
        assert await storage.get_data(KEY) == {**BEFORE[1], "number": 1}
        assert await keys(storage, user_id=KEY.user_id) == [KEY]


@pytest.mark.parametrize("backend", [POSTGRESQL[2], *MARIADB[1:]], ids=str)
async def test_a_write_under_way_is_not_deleted_with_what_has_expired(
    backend: Backend, open_storage: Open
) -> None:
    """That of an update, say, which has found the conversation alive."""
    storage = await open_storage(backend, columns=True, expires_after=DAY)
    await storage.set_state(key_of(1), Order.cart)
    await age(storage, DAY)
    table, engine = storage.table, sync_engine(storage, backend)
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(update(table).values(state="written"))
        async with anyio.create_task_group() as group:
            group.start_soon(storage.set_data, history_of(1), HISTORY)
            await anyio.sleep(0.3)
            transaction.commit()
    engine.dispose()
    assert await storage.get_state(key_of(1)) == "written"


def test_a_key_that_the_column_for_the_conversation_does_not_hold_is_refused() -> None:
    class Base(DeclarativeBase):
        pass

    class Model(ConversationColumns, FSMData, Base):
        __tablename__ = "fsm_of_my_own"
        id: Mapped[str] = mapped_column(String(500), primary_key=True)

    limits = Limits(table_of(Model), mysql.dialect())
    with pytest.raises(ValueError, match=r"column 'conversation' of table .* holds 255"):
        limits.check(None, "x" * 300)  # type: ignore[arg-type]


# Tables


def test_the_table_has_what_the_base_says_of_tables() -> None:
    class Base(DeclarativeBase):
        __table_args__ = ({"schema": "bot", "comment": "conversations"},)

    class Model(ConversationColumns, FSMData, Base):
        __tablename__ = "fsm_of_my_own"

    class OfImportance(Model):
        pass

    storage = SQLAlchemyStorage(sessionmaker(), Base, columns=True)
    for table in (storage.table, Model.__table__):
        assert (table.schema, table.comment) == ("bot", "conversations")  # type: ignore[attr-defined]
    assert "ix_aiogram_fsm_data_state" in {index.name for index in storage.table.indexes}
    assert SQLAlchemyStorage(sessionmaker(), Base, columns=True).table is storage.table


def test_a_table_that_was_declared_without_the_columns_does_not_get_them() -> None:
    metadata = MetaData()
    storage = SQLAlchemyStorage(sessionmaker(), metadata)
    with pytest.raises(ValueError, match="declared without the columns"):
        SQLAlchemyStorage(sessionmaker(), metadata, columns=True)
    assert SQLAlchemyStorage(sessionmaker(), metadata).table is storage.table


async def test_a_table_that_is_there_without_the_columns_is_told_of_at_startup(
    storage: SQLAlchemyStorage,
) -> None:
    column = "DROP COLUMN idle_handled"
    await storage.create_table()
    await storage.run_sync(
        lambda session: session.execute(text(f"ALTER TABLE {storage.table.name} {column}")) and None
    )
    for start in (storage.create_table, storage.check_table):
        with pytest.raises(RuntimeError, match=r"lacks the columns idle_handled.*migration"):
            await start()


class UserFirst(KeyBuilder):
    """Another key builder, whose strings look like those of ``FullKeyBuilder``."""

    def build(self, key: StorageKey, part: Any = None) -> str:
        return f"{key.user_id}:{key.chat_id}:{key.bot_id}"


async def test_columns_are_not_filled_from_a_key_that_is_another_row_s(
    backend: Backend, open_storage: Open
) -> None:
    storage = await open_storage(backend, columns=True, key_builder=UserFirst())
    row: dict[str, Any] = {column.name: None for column in storage.table.columns}
    row |= {"id": "1:2:42", "state": "Order:cart"}
    await storage.run_sync(
        lambda session: session.connection().execute(insert(storage.table), row) and None
    )
    assert await storage.fill_columns() == 0

    def parse(id: str) -> StorageKey:
        user, chat, bot = map(int, id.split(":"))
        return StorageKey(bot_id=bot, chat_id=chat, user_id=user)

    assert await storage.fill_columns(parse) == 1
    assert await keys(storage) == [StorageKey(bot_id=42, chat_id=2, user_id=1)]
