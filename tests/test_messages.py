"""Bad input gets an error that says what to do."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiogram import Bot, Dispatcher
from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from aiogram.types import ErrorEvent, Update
from backends import MARIADB, SERVERS, SQLITE, Backend
from blocking import locked
from conftest import Open
from sqlalchemy import JSON, URL, Column, MetaData, String, create_engine
from sqlalchemy.exc import DBAPIError, InvalidRequestError, UnboundExecutionError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    declarative_base,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import StaticPool
from sqlmodel import SQLModel

from hybrid_storage import (
    CorruptDataError,
    FSMData,
    SessionMiddleware,
    SQLAlchemyEventIsolation,
    SQLAlchemyStorage,
)

FACTORY = sessionmaker(create_engine("sqlite:///unused.db"))


async def test_an_unbound_factory(key: StorageKey) -> None:
    storage = SQLAlchemyStorage(sessionmaker())
    with pytest.raises(UnboundExecutionError, match=r"sessionmaker\(engine\)"):
        await storage.get_state(key)


@pytest.mark.parametrize("bad", ["42:7:7", 42, None, ("42", "7", "7")])
async def test_a_key_that_is_no_storage_key(open_storage: Open, bad: Any) -> None:
    storage = await open_storage(SQLITE[0])
    with pytest.raises(TypeError, match="a key is a StorageKey"):
        await storage.get_state(bad)


@pytest.mark.parametrize("name", ["retry_for", "slow_after"])
@pytest.mark.parametrize(("bad", "error"), [("30", TypeError), (-1, ValueError), (True, TypeError)])
def test_seconds_that_are_none(name: str, bad: Any, error: type[Exception]) -> None:
    options: dict[str, Any] = {name: bad}
    with pytest.raises(error, match=f"{name} is a number of seconds"):
        SQLAlchemyStorage(FACTORY, **options)


@pytest.mark.parametrize("bad", [create_engine("sqlite://"), FACTORY, None, "session"])
async def test_what_is_no_session_for_an_operation(
    open_storage: Open, key: StorageKey, bad: Any
) -> None:
    storage = await open_storage(SQLITE[0])
    with pytest.raises(TypeError, match="takes a Session that you have opened"):
        storage.operations.get_state(bad, key)


async def test_operations_take_a_scoped_session(open_storage: Open, key: StorageKey) -> None:
    storage = await open_storage(SQLITE[0])
    registry = scoped_session(sessionmaker(await storage.run_sync(lambda s: s.get_bind().engine)))
    storage.operations.set_state(registry, key, "waiting")
    registry.commit()
    assert await storage.get_state(key) == "waiting"
    registry.remove()


async def test_a_function_without_a_session_parameter(open_storage: Open) -> None:
    storage = await open_storage(SQLITE[0])

    def legacy() -> int:
        return 5

    with pytest.raises(TypeError, match=r"run_sync\(lambda session: function\(\)\)"):
        await storage.run_sync(legacy)
    assert await storage.run_sync(lambda session: legacy()) == 5


def test_the_old_name_of_postgresql() -> None:
    with pytest.raises(ValueError, match=r"postgresql\+psycopg://"):
        SQLAlchemyStorage.from_url("postgres://root@127.0.0.1/test")


@pytest.mark.parametrize(
    ("url", "module", "other"),
    [
        ("postgresql+asyncpg://root:secret@127.0.0.1/test", "asyncpg", "postgresql+psycopg"),
        ("postgresql+psycopg://root:secret@127.0.0.1/test", "psycopg", "postgresql+asyncpg"),
        ("mysql://root:secret@127.0.0.1/test", "MySQLdb", "mysql+pymysql"),
        ("sqlite+aiosqlite:///test.db", "aiosqlite", "sqlite"),
    ],
)
def test_a_driver_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, other: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    expected = rf"needs the driver {module}, which .*'{re.escape(other)}://\.\.\.'"
    with pytest.raises(ModuleNotFoundError, match=expected):
        SQLAlchemyStorage.from_url(url)


async def test_data_that_json_does_not_know(open_storage: Open, key: StorageKey) -> None:
    storage = await open_storage(SQLITE[0])
    data = {"name": "Ada", "born": datetime.date(1815, 12, 10)}
    for call in (storage.set_data, storage.update_data):
        with pytest.raises(TypeError, match=r"field 'born' .* json_dumps"):
            await call(key, data)
    assert await storage.get_data(key) == {}


def test_isolation_that_is_constructed_by_hand() -> None:
    isolation: Any = SQLAlchemyEventIsolation
    options = dict.fromkeys(["lease", "poll", "wait"], 1.0)
    with pytest.raises(TypeError, match=r"storage.create_isolation\(\)"):
        isolation(None, None, None, None, None, **options)


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_missing_table_is_named_once_at_the_start(
    backend: Backend, open_storage: Open
) -> None:
    storage = await open_storage(backend)
    storage.create_isolation()
    with pytest.raises(RuntimeError, match=f"table '{storage.table.name}_lock' is missing"):
        await storage.check_table()
    await storage.create_table()
    await storage.check_table()
    lock = storage.metadata.tables[f"{storage.table.name}_lock"]
    await storage.run_sync(lambda session: lock.drop(session.connection()))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite://"])
async def test_a_database_in_memory_just_works(url: str, key: StorageKey) -> None:
    storage = SQLAlchemyStorage.from_url(url)
    await storage.create_table()
    async with storage.transaction():
        await storage.update_data(key, {"name": "Ada"})
    assert await storage.get_data(key) == {"name": "Ada"}
    await storage.close()


async def test_what_a_storage_and_its_errors_look_like(tmp_path: Path) -> None:
    storage = SQLAlchemyStorage.from_url(f"sqlite:///{tmp_path}/bot.db", table_name="bot")
    assert repr(storage) == "<SQLAlchemyStorage of table 'bot' by a sessionmaker>"
    assert CorruptDataError.__module__ == "hybrid_storage"
    assert storage.engine is not None
    await storage.close()


def test_a_model_of_ones_own_has_its_own_parameter() -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "conversation"

    storage = SQLAlchemyStorage(FACTORY, model=Conversation)
    assert storage.model is Conversation


class WithPart(KeyBuilder):
    """Wants to be told which part of the conversation it is."""

    def build(self, key: StorageKey, part: Any) -> str:  # type: ignore[override]
        return f"{key.user_id}:{part}"


def test_a_key_builder_that_requires_part_is_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="`part` needs a default"):
        SQLAlchemyStorage(FACTORY, key_builder=WithPart())


def test_a_schema_in_the_tables_name() -> None:
    with pytest.raises(ValueError, match=r"MetaData\(schema='bot'\)"):
        SQLAlchemyStorage(FACTORY, MetaData(), "bot.fsm")


def test_a_base_with_a_column_that_nobody_fills() -> None:
    class Base(DeclarativeBase):
        tenant: Mapped[str] = mapped_column(String)

    with pytest.raises(ValueError, match=r"'tenant' .* NOT NULL .* Base.metadata"):
        SQLAlchemyStorage(FACTORY, Base)
    SQLAlchemyStorage(FACTORY, Base.metadata, "other")


def test_a_data_column_of_json() -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "conversation"
        data: Mapped[Any] = mapped_column(JSON)

    with pytest.raises(ValueError, match="make it Text"):
        SQLAlchemyStorage(FACTORY, model=Conversation)


async def test_sqlmodel_lends_its_metadata(tmp_path: Path, key: StorageKey) -> None:
    storage = SQLAlchemyStorage.from_url(
        f"sqlite:///{tmp_path}/bot.db", metadata=SQLModel, table_name="of_sqlmodel"
    )
    assert "of_sqlmodel" in SQLModel.metadata.tables
    await storage.create_table()
    await storage.set_state(key, "waiting")
    assert await storage.get_state(key) == "waiting"
    await storage.close()


def test_a_declarative_base_of_the_14_style() -> None:
    base: Any = declarative_base()
    storage = SQLAlchemyStorage(FACTORY, base)
    assert storage.table.name in base.metadata.tables


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_a_write_that_would_wait_for_its_own_task_is_refused_at_once(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    first, second = await open_storage(backend), None
    engine = await first.run_sync(lambda session: session.get_bind().engine)
    if backend.is_async:
        from sqlalchemy.ext.asyncio import AsyncEngine

        second = SQLAlchemyStorage(backend.factory(AsyncEngine(engine)), table_name="second")
    else:
        second = SQLAlchemyStorage(backend.factory(engine), table_name="second")
    await second.create_table()
    async with first.transaction() as session:
        with pytest.raises(RuntimeError, match=r"storage.using\(session\)"):
            await second.set_state(key, "waiting")
        async with second.using(session):
            await second.set_state(key, "waiting")
    assert await second.get_state(key) == "waiting"


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_the_last_error_of_a_wait_says_what_may_hold_it_up(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    storage = await open_storage(
        backend, retry_for=0, engine_options={"connect_args": {"timeout": 0.1}}
    )
    await storage.set_state(key, "before")
    with (
        locked(backend, url_of(backend), storage, key),
        pytest.raises(DBAPIError, match=r"storage.using\(session\)"),
    ):
        await storage.set_state(key, "after")


@pytest.mark.parametrize("backend", MARIADB, ids=str)
async def test_a_character_set_that_would_lose_emoji(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"connect_args": {"charset": "utf8"}})
    unescaped = await open_storage(
        backend,
        engine_options={"connect_args": {"charset": "utf8"}},
        json_dumps=lambda data: json.dumps(data, ensure_ascii=False),
    )
    with pytest.raises(ValueError, match="charset=utf8mb4"):
        await unescaped.set_data(key, {"mood": "🚀"})
    with pytest.raises(ValueError, match="charset=utf8mb4"):
        await storage.set_state(key, "🚀")
    await storage.set_state(key, "Имя")
    assert await storage.get_state(key) == "Имя"


@pytest.mark.parametrize("used", [True, False])
async def test_an_error_handler_that_takes_the_session_sees_the_first_error(
    open_storage: Open, used: bool
) -> None:
    storage = await open_storage(SQLITE[0])
    dp = Dispatcher(storage=storage)
    dp.update.outer_middleware(SessionMiddleware(storage))
    seen: list[BaseException] = []

    @dp.message()
    async def fail(message: object) -> None:
        raise ZeroDivisionError

    @dp.errors()
    async def on_error(event: ErrorEvent, session: Session) -> None:
        seen.append(event.exception)
        if used:
            with pytest.raises(InvalidRequestError, match=r"storage.transaction\(\) as session"):
                session.execute(None)  # type: ignore[call-overload]

    person = {"id": 7, "is_bot": False, "first_name": "Ada"}
    chat = {"id": 7, "type": "private"}
    message = {"message_id": 1, "date": 1, "chat": chat, "from": person, "text": "hello"}
    update = Update.model_validate({"update_id": 1, "message": message})
    await dp.feed_update(Bot("42:token"), update)
    assert [type(each) for each in seen] == [ZeroDivisionError]


async def test_pools_of_one_connection_are_still_static() -> None:
    storage = SQLAlchemyStorage.from_url("sqlite://")
    assert storage.engine is not None
    assert isinstance(storage.engine.pool, StaticPool)
    await storage.close()


class Sealed(String):
    """Not a decorator: compared as it is."""


def test_other_text_types_are_accepted() -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "conversation"
        data: Mapped[str | None] = mapped_column(Sealed)
        note = Column(String)

    assert SQLAlchemyStorage(FACTORY, model=Conversation).model is Conversation
    logging.getLogger(__name__).debug("constructed")


@pytest.mark.parametrize("backend", SERVERS[:1], ids=str)
async def test_what_a_lock_and_a_function_are_not(backend: Backend, open_storage: Open) -> None:
    storage = await open_storage(backend)
    no_key: Any = "42:7:7"
    isolation = storage.create_isolation(lease=None)
    with pytest.raises(TypeError, match="a key is a StorageKey"):
        isolation.still_held(no_key)
    with pytest.raises(TypeError, match="a key is a StorageKey"):
        async with isolation.lock(no_key):
            pass
    for wrong in ("30", float("inf")):
        with pytest.raises((TypeError, ValueError), match="lease is a number of seconds"):
            storage.create_isolation(lease=wrong)
    with pytest.raises(TypeError, match="takes a function, and its arguments after it"):
        await storage.run_sync(2)


@pytest.mark.parametrize("backend", SERVERS[:1], ids=str)
async def test_a_long_wait_for_a_lock_is_logged(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend, slow_after=0.1)
    first = storage.create_isolation(lease=None)

    async def wait() -> None:
        async with first.lock(key):
            pass

    async with first.lock(key):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.5)
    await waiting
    assert "use one isolation" in caplog.text
