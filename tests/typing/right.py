"""What users write, and the types that come of it: no type checker may find an error here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypedDict

from aiogram import Dispatcher
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder, KeyBuilder, StorageKey
from aiogram.types import Message
from anyio import CapacityLimiter
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import MetaData, Table, create_engine, select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlmodel import SQLModel
from typing_extensions import assert_type

from hybrid_storage import (
    ConversationColumns,
    CorruptDataError,
    FoundConversation,
    FSMData,
    FullKeyBuilder,
    Operations,
    SessionMiddleware,
    SQLAlchemyEventIsolation,
    SQLAlchemyStorage,
    declare_model,
)


class Base(DeclarativeBase):
    pass


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Conversation(FSMData, Base):
    __tablename__ = "conversation"
    note: Mapped[str | None] = mapped_column()


class Form(StatesGroup):
    name = State()


class Answers(TypedDict, total=False):
    name: str
    age: int


class MySession(Session):
    pass


class MyAsyncSession(AsyncSession):
    pass


def dumps(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode()


Local = sessionmaker(create_engine("sqlite:///bot.db"))
db = SQLAlchemy()
db_on_base = SQLAlchemy(model_class=Base)
AsyncLocal = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///bot.db"))

# Every kind of factory

SQLAlchemyStorage(Local)
SQLAlchemyStorage(AsyncLocal)
SQLAlchemyStorage(sessionmaker())
SQLAlchemyStorage(async_sessionmaker(expire_on_commit=False))
SQLAlchemyStorage(sessionmaker(class_=MySession))
SQLAlchemyStorage(async_sessionmaker(class_=MyAsyncSession))
SQLAlchemyStorage(scoped_session(Local))
SQLAlchemyStorage(async_scoped_session(AsyncLocal, scopefunc=lambda: 1))

# Every place for the table

SQLAlchemyStorage(Local, Base)
SQLAlchemyStorage(Local, DataclassBase)
SQLAlchemyStorage(Local, SQLModel)
SQLAlchemyStorage(db.session, db.Model)
SQLAlchemyStorage(db_on_base.session, db_on_base.Model)
SQLAlchemyStorage(Local, Base.metadata)
SQLAlchemyStorage(Local, MetaData(schema="bots"), "fsm")
SQLAlchemyStorage(Local, None, "fsm")
SQLAlchemyStorage(Local, table_name=Conversation)
SQLAlchemyStorage(Local, Base, Conversation)
SQLAlchemyStorage(Local, Base, declare_model(Base, "fsm"))
assert_type(declare_model(Base, "fsm"), type[FSMData])
assert_type(declare_model(MetaData(), "fsm"), type[FSMData])

# Every other argument

SQLAlchemyStorage(
    sessionmaker=Local,
    metadata=Base.metadata,
    table_name="fsm",
    key_builder=DefaultKeyBuilder(with_destiny=True),
    json_dumps=dumps,
    json_loads=json.loads,
    limiter=CapacityLimiter(5),
    retry_for=0,
)
SQLAlchemyStorage(Local, Base, "fsm", FullKeyBuilder(), json.dumps, json.loads)
SQLAlchemyStorage(session=AsyncLocal, base=Base)
SQLAlchemyStorage(session=Local)
SQLAlchemyStorage.from_url("sqlite+aiosqlite:///bot.db")
SQLAlchemyStorage.from_url("sqlite:///bot.db", metadata=Base, table_name="fsm", echo=True)

# What it gives

storage: SQLAlchemyStorage[Any] = SQLAlchemyStorage(Local, Base)
assert_type(storage.model, type[FSMData])
assert_type(storage.metadata, MetaData)
assert_type(storage.operations, Operations)
table: Table = storage.table
base_storage: BaseStorage = storage
key_builder: KeyBuilder = FullKeyBuilder()
assert_type(FullKeyBuilder().build(StorageKey(1, 2, 3)), str)
assert_type(FullKeyBuilder().build(StorageKey(1, 2, 3), "lock"), str)
error: ValueError = CorruptDataError()
isolation = storage.create_isolation(lease=10, wait=60)
assert_type(isolation, SQLAlchemyEventIsolation)
dispatcher = Dispatcher(storage=storage, events_isolation=isolation)
dispatcher.startup.register(storage.create_table)
dispatcher.update.outer_middleware(SessionMiddleware(storage))


async def use(key: StorageKey) -> None:
    await storage.create_table()
    await storage.set_state(key, "form:name")
    await storage.set_state(key, Form.name)
    await storage.set_state(key, None)
    await storage.set_state(key)
    assert_type(await storage.get_state(key), str | None)
    await storage.set_data(key, {"name": "Ada", "age": 36})
    answers: Answers = {"name": "Ada"}
    await storage.set_data(key, answers)
    assert_type(await storage.get_data(key), dict[str, Any])
    assert_type(await storage.update_data(key, {"name": "Ada"}), dict[str, Any])
    assert_type(await storage.update_data(key, data=answers), dict[str, Any])
    assert_type(await storage.get_value(key, "name"), Any | None)
    assert_type(await storage.get_value(key, "name", "nobody"), Any)
    await storage.clear(key)
    await storage.close()
    await FSMContext(storage, key).set_state(Form.name)


def use_synchronously(session: Session, key: StorageKey) -> None:
    operations = storage.operations
    operations.set_state(session, key, Form.name)
    operations.set_state(session, key)
    assert_type(operations.get_state(session, key), str | None)
    operations.set_data(session, key, {"name": "Ada"})
    assert_type(operations.get_data(session, key), dict[str, Any])
    assert_type(operations.update_data(session, key, {"age": 36}), dict[str, Any])
    assert_type(operations.get_value(session, key, "name"), Any | None)
    assert_type(operations.get_value(session, key, "name", "nobody"), Any)
    operations.clear(session, key)


async def use_in_a_session_of_ones_own(session: AsyncSession, key: StorageKey) -> str | None:
    await session.run_sync(storage.operations.set_state, key, Form.name)
    await session.run_sync(storage.operations.set_data, key, {"name": "Ada"})
    state: str | None = await session.run_sync(storage.operations.get_state, key)
    return state


def query(session: Session) -> str | None:
    model = storage.model
    found = session.scalars(select(model).where(model.state == "form:name")).one()
    assert_type(found, FSMData)
    assert_type(found.id, str)
    assert_type(found.state, str | None)
    assert_type(found.data, str | None)
    return session.scalars(select(Conversation.note)).one()


def legacy(session: Session, name: str, *, age: int = 0) -> list[int]:
    return [len(name), age]


async def use_transactions(key: StorageKey, session: Session, other: AsyncSession) -> None:
    sync_storage: SQLAlchemyStorage[Session] = SQLAlchemyStorage(Local)
    async with sync_storage.transaction() as own:
        assert_type(own, Session)
        await sync_storage.set_state(key, "form:name")
    async_storage: SQLAlchemyStorage[AsyncSession] = SQLAlchemyStorage(AsyncLocal)
    async with async_storage.transaction() as own_async:
        assert_type(own_async, AsyncSession)
        await own_async.execute(select(Conversation))
    async with storage.using(session), storage.using(other), storage.using(scoped_session(Local)):
        await storage.clear(key)
    assert_type(await storage.run_sync(legacy, "Ada"), list[int])
    assert_type(await storage.run_sync(legacy, name="Ada", age=36), list[int])
    assert_type(await storage.run_sync(storage.operations.get_state, key), str | None)


# Conversations


class Purchase(StatesGroup):
    payment = State()


async def steer(key: StorageKey, session: Session, message: Message) -> None:
    async for found in storage.find(state=Purchase.payment, idle_for=60, thread_id=None):
        assert_type(found, FoundConversation)
        assert_type(found.data, dict[str, Any])
    for found in storage.operations.find(session, state=Purchase, destiny=None):
        assert_type(found.key, StorageKey)
    assert_type(await storage.count(state=["a", Purchase.payment]), int)
    assert_type(await storage.count_by_state(bot_id=42), dict[str | None, int])
    assert_type(await storage.conversation(key), FoundConversation)
    assert_type(await storage.change_data(key, lambda data: {**data, "a": 1}), dict[str, Any])
    assert_type(await storage.remove_data(key, "a", "b"), dict[str, Any])
    assert_type(await storage.change_states(Purchase.payment, user_id=7), int)
    assert_type(await storage.rename_state(Purchase, "Order", is_group=True), int)
    assert_type(storage.operations.clear_all(session, chat_id=7), int)
    assert_type(FullKeyBuilder().parse("42:7:7"), StorageKey)
    await storage.follow_chat(message)

    async def remind(conversation: FoundConversation) -> None: ...

    await storage.on_idle(after=60, action=remind, isolation=isolation, state=Purchase)


class Found(ConversationColumns, FSMData, Base):
    __tablename__ = "found"


assert_type(SQLAlchemyStorage(Local, model=Found, expires_after=60).model, type[Found])
