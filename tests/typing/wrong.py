"""What users may not write: each line with a mark, and no other, has the error of that name."""

from __future__ import annotations

from aiogram.fsm.storage.base import DefaultKeyBuilder, StorageKey
from sqlalchemy import MetaData, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from hybrid_storage import FSMData, SQLAlchemyStorage, declare_model


class Base(DeclarativeBase):
    pass


class NoModel:
    pass


engine = create_engine("sqlite:///bot.db")
async_engine = create_async_engine("sqlite+aiosqlite:///bot.db")
factory = sessionmaker(engine)
async_factory = async_sessionmaker(async_engine)

# Constructors

SQLAlchemyStorage(engine)  # E: arg-type
SQLAlchemyStorage(async_engine)  # E: arg-type
SQLAlchemyStorage("sqlite:///bot.db")  # E: arg-type
SQLAlchemyStorage(lambda: Session(engine))  # E: arg-type
SQLAlchemyStorage(Session)  # E: arg-type
SQLAlchemyStorage(factory())  # E: arg-type
SQLAlchemyStorage(async_factory())  # E: arg-type
SQLAlchemyStorage(factory, "fsm")  # E: arg-type
SQLAlchemyStorage(factory, MetaData)  # E: arg-type
SQLAlchemyStorage(factory, NoModel)  # E: arg-type
SQLAlchemyStorage(factory, Base, NoModel)  # E: type-var
SQLAlchemyStorage(factory, Base, None)  # E: arg-type
SQLAlchemyStorage(factory, key_builder=DefaultKeyBuilder)  # E: arg-type
SQLAlchemyStorage(factory, json_dumps="json")  # E: arg-type
SQLAlchemyStorage(factory, limiter=5)  # E: arg-type
SQLAlchemyStorage(factory, retry_for="long")  # E: arg-type
SQLAlchemyStorage(factory, unknown=True)  # E: call-arg
SQLAlchemyStorage(session=engine, base=Base)  # E: arg-type
SQLAlchemyStorage.from_url(engine)  # E: arg-type
SQLAlchemyStorage.from_url("sqlite:///bot.db", metadata="fsm")  # E: arg-type
declare_model("fsm", Base)  # E: arg-type
declare_model(Base)  # E: call-arg
bad_model: type[FSMData] = NoModel  # E: assignment

storage = SQLAlchemyStorage[Session](factory, Base)


async def use(key: StorageKey) -> None:
    await storage.set_state(key, 5)  # E: arg-type
    await storage.set_state("42:7:7", "form:name")  # E: arg-type
    await storage.set_state()  # E: call-arg
    await storage.set_data(key, [1])  # E: arg-type
    await storage.set_data(key, None)  # E: arg-type
    await storage.set_data(key, {1: "one"})  # E: dict-item
    await storage.update_data(key, "name")  # E: arg-type
    await storage.update_data(key, name="Ada")  # E: call-arg
    state: str = await storage.get_state(key)  # E: assignment
    number: int = await storage.get_data(key)  # E: assignment
    await storage.get_value(key, 5)  # E: call-overload
    await storage.get_value(key)  # E: call-overload
    storage.get_state(key)  # E: unused-coroutine
    await storage.clear()  # E: call-arg
    await storage.create_table(engine)  # E: call-arg
    del state, number


async def use_operations(session: Session, async_session: AsyncSession, key: StorageKey) -> None:
    operations = storage.operations
    operations.get_state(async_session, key)  # E: arg-type
    operations.set_state(async_session, key)  # E: arg-type
    operations.get_data(async_session, key)  # E: arg-type
    operations.set_data(async_session, key, {})  # E: arg-type
    operations.update_data(async_session, key, {})  # E: arg-type
    operations.get_value(async_session, key, "name")  # E: call-overload
    operations.clear(async_session, key)  # E: arg-type
    operations.get_state(engine, key)  # E: arg-type
    operations.get_state(key)  # E: arg-type, call-arg
    operations.set_state(session, key, 5)  # E: arg-type
    operations.set_state(session, "form:name")  # E: arg-type
    operations.set_data(session, key, [1])  # E: arg-type
    operations.update_data(session, key, name="Ada")  # E: call-arg
    operations.get_value(session, key, 5)  # E: call-overload
    data: str = operations.get_data(session, key)  # E: assignment
    await operations.get_state(session, key)  # E: misc
    assert data


def legacy(session: Session, name: str) -> int:
    return len(name)


async def use_transactions(key: StorageKey) -> None:
    await storage.run_sync(legacy)  # E: call-arg
    await storage.run_sync(legacy, 5)  # E: arg-type
    await storage.run_sync(legacy, "Ada", "Eve")  # E: call-arg
    await storage.run_sync(len)  # E: arg-type
    name: str = await storage.run_sync(legacy, "Ada")  # E: arg-type
    await storage.run_sync(storage.operations.set_state, key, 5)  # E: arg-type
    assert name
    async with storage.using(factory):  # E: arg-type
        pass
    async with storage.using(engine):  # E: arg-type
        pass
    async with storage.transaction() as session:
        await session.execute(None)  # E: call-overload


async def use_inferred_types() -> None:
    async with SQLAlchemyStorage(sessionmaker(engine)).transaction() as session:
        await session.commit()  # E: func-returns-value, misc
    async with SQLAlchemyStorage(async_sessionmaker(async_engine)).transaction() as other:
        other.commit()  # E: unused-coroutine
        other.query(NoModel)  # E: attr-defined


# Conversations


async def steer(storage: SQLAlchemyStorage, key: StorageKey, session: Session) -> None:
    storage.find(user="7")  # E: call-arg
    storage.find(user_id="7")  # E: arg-type
    storage.operations.find(user_id=7)  # E: call-arg
    await storage.change_data(key, {"a": 1})  # E: arg-type
    await storage.change_data(key, lambda data: None)  # E: arg-type, return-value
    await storage.rename_state(1, 2)  # E: arg-type
    await storage.on_idle(after=60, action=print)  # E: call-arg, arg-type
