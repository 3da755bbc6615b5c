"""Whoever listens to an engine misses no statement, and its connections come back as they were."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import locked
from conftest import Open, dispose, engine_of, every_call, give_up
from sqlalchemy import (
    URL,
    Dialect,
    Engine,
    MetaData,
    String,
    TypeDecorator,
    event,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.util import greenlet_spawn

from hybrid_storage import FSMData, SQLAlchemyStorage

on_every_driver = pytest.mark.parametrize("backend", SERVERS, ids=str)
on_postgresql = pytest.mark.parametrize("backend", POSTGRESQL, ids=str)


@on_every_driver
async def test_what_an_application_sets_for_the_engine_is_obeyed(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey, open_storage: Open
) -> None:
    other = await open_storage(backend)
    renamed = {"nowhere": None}
    engine: Any = backend.engine(url_of(backend)).execution_options(schema_translate_map=renamed)
    metadata = MetaData(schema="nowhere")
    storage = SQLAlchemyStorage(backend.factory(engine), metadata, table_name=other.table.name)
    await storage.set_state(key, "Form:name")
    assert await other.get_state(key) == "Form:name"
    await dispose(engine)


class Reversed(TypeDecorator[str]):
    """Keeps text back to front."""

    impl = String(1000)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value and value[::-1]

    process_result_value = process_bind_param


@pytest.mark.parametrize("backend", [*SQLITE, *POSTGRESQL], ids=str)
async def test_a_columns_own_type_sees_what_is_written_and_read(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "reversed_conversation"

        state: Mapped[str | None] = mapped_column(Reversed())

    storage = await open_storage(backend, table_name=Conversation)
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"
    stored = await storage.run_sync(
        lambda session: (
            session.connection().exec_driver_sql("SELECT state FROM reversed_conversation").scalar()
        ),
    )
    assert stored == "eman:mroF"


@on_every_driver
async def test_a_function_that_gives_a_columns_value_is_called(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    numbers = iter(range(1, 100))

    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "counted_conversation"

        writes: Mapped[int] = mapped_column(default=lambda: next(numbers))

    storage = await open_storage(backend, table_name=Conversation)
    await storage.set_state(key, "Form:name")
    count = await storage.run_sync(lambda session: session.query(Conversation.writes).scalar())
    assert count == 1


def autocommits(session: Session) -> bool:
    connection: Any = session.connection().connection.dbapi_connection
    return bool(connection.autocommit)


@on_postgresql
async def test_a_connection_comes_back_without_autocommit(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})
    await storage.set_state(key, "Form:name")
    assert not await storage.run_sync(autocommits)
    await storage.update_data(key, {"name": "Ada"})
    assert not await storage.run_sync(autocommits)
    await storage.run_sync(lambda session: storage.table.drop(session.connection()))
    with pytest.raises(DBAPIError, match=storage.table.name):
        await storage.get_state(key)
    assert not await storage.run_sync(autocommits)


@on_postgresql
@pytest.mark.parametrize(
    "options",
    [{"pool_pre_ping": True}, {"pool_recycle": 0}, {"isolation_level": "AUTOCOMMIT"}],
    ids=lambda options: next(iter(options)),
)
async def test_an_engines_own_settings_are_no_obstacle(
    backend: Backend, options: dict[str, Any], open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options=options)
    for _ in range(3):
        await every_call(storage, key)


@on_postgresql
async def test_a_pools_listener_may_wait_for_the_driver(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    engine = engine_of(storage)
    seen: list[object] = []

    def look(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        seen.append(cursor.fetchone())
        cursor.close()
        connection.rollback()

    event.listen(engine, "checkout", look)
    await every_call(storage, key)
    assert len(seen) > 10


@on_postgresql
@pytest.mark.parametrize("when", ["connect", "checkout"])
@pytest.mark.parametrize("by", ["the driver", "SQLAlchemy"])
async def test_a_transaction_that_a_listener_has_begun_is_committed(
    backend: Backend,
    by: str,
    when: str,
    url_of: Callable[[Backend], URL],
    open_storage: Open,
    key: StorageKey,
) -> None:
    def look(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    table_name = (await open_storage(backend)).table.name
    engine: Any = backend.engine(url_of(backend))
    event.listen(getattr(engine, "sync_engine", engine), when, look)
    if by == "SQLAlchemy":
        event.listen(getattr(engine, "sync_engine", engine), "after_execute", lambda *_: None)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=table_name)
    for number in range(3):
        await storage.set_state(key, f"Form:{number}")
        assert await storage.get_state(key) == f"Form:{number}"
    async with anyio.create_task_group() as calls:
        for number in range(8):
            calls.start_soon(storage.update_data, key, {str(number): number})
    assert await storage.get_data(key) == {str(number): number for number in range(8)}
    await dispose(engine)


@on_every_driver
async def test_a_pool_that_resets_nothing_gets_no_open_transaction(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    options = {"pool_reset_on_return": None, "pool_size": 2, "max_overflow": 0}
    storage = await open_storage(backend, engine_options=options)
    other = await open_storage(backend, table_name=storage.table.name)
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"
    await other.set_state(key, "Form:age")
    assert await storage.get_state(key) == "Form:age"
    await storage.clear(key)


async def test_a_connection_whose_statement_timed_out_is_given_up(
    url_of: Callable[[Backend], URL], open_storage: Open, key: StorageKey
) -> None:
    backend = next(each for each in POSTGRESQL if each.driver == "asyncpg")
    options = {"connect_args": {"command_timeout": 0.3}}
    storage = await open_storage(backend, engine_options=options, retry_for=0)
    await storage.set_state(key, "old")
    closed: list[object] = []
    event.listen(engine_of(storage), "invalidate", lambda *_: closed.append(None))
    with locked(backend, url_of(backend), storage, key), pytest.raises(asyncio.TimeoutError):
        await storage.set_state(key, "new")
    assert len(closed) == 1
    # The server may have been told to cancel it, or may finish it.
    assert await storage.get_state(key) in ("old", "new")


@on_postgresql
async def test_a_connection_that_was_given_up_is_opened_anew(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})
    await storage.set_state(key, "Form:name")
    await storage.run_sync(give_up)
    assert await storage.get_state(key) == "Form:name"


@pytest.mark.parametrize("backend", POSTGRESQL[2:], ids=str)
async def test_a_connection_that_the_application_opens_itself_is_opened_anew(
    backend: Backend, url_of: Callable[[Backend], URL], open_storage: Open, key: StorageKey
) -> None:
    other: Any = backend.engine(url_of(backend))
    arguments, keywords = other.dialect.create_connect_args(other.url)

    def connect() -> Any:
        return other.dialect.connect(*arguments, **keywords)

    options = {"creator": connect, "pool_size": 1, "max_overflow": 0}
    storage = await open_storage(backend, engine_options=options)
    for _ in range(2):
        await every_call(storage, key)
        await storage.run_sync(give_up)


@pytest.mark.parametrize("backend", POSTGRESQL[2:], ids=str)
async def test_a_transaction_that_a_listener_has_ended_in_its_own_way_is_none(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLAlchemy goes on taking it for begun, and would wait for its end."""
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})

    def look(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.execute("COMMIT")
        cursor.close()

    event.listen(engine_of(storage), "connect", look)
    await storage.run_sync(give_up)
    await every_call(storage, key)
    assert "MissingGreenlet" not in caplog.text


@pytest.mark.parametrize("backend", POSTGRESQL[2:], ids=str)
async def test_a_listener_that_connects_may_wait_for_it(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})
    mine = engine_of(storage).dialect

    def connect(dialect: Any, _: object, arguments: Any, keywords: Any) -> Any:
        return dialect.connect(*arguments, **keywords) if dialect is mine else None

    await every_call(storage, key)
    event.listen(Engine, "do_connect", connect)
    try:
        for _ in range(2):
            await storage.run_sync(give_up)
            await every_call(storage, key)
    finally:
        event.remove(Engine, "do_connect", connect)


@pytest.mark.parametrize("backend", POSTGRESQL[2:], ids=str)
async def test_an_engine_may_be_disposed_while_calls_run(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 5})
    await storage.set_state(key, "Form:name")
    calls = [asyncio.ensure_future(storage.get_state(key)) for _ in range(5)]
    await anyio.lowlevel.checkpoint()  # they begin
    engine = AsyncEngine(engine_of(storage))
    pool = engine.pool
    await engine.dispose()
    assert await asyncio.gather(*calls) == ["Form:name"] * 5
    await greenlet_spawn(pool.dispose)  # it takes back what was out
    assert "MissingGreenlet" not in caplog.text


@on_every_driver
async def test_a_connection_beyond_the_pool_that_cannot_be_opened_is_tried_again(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    options = {"pool_size": 1, "max_overflow": 0}
    storage = await open_storage(backend, engine_options=options)
    await storage.set_state(key, "Form:name")
    engine = engine_of(storage)
    failures = [engine.dialect.loaded_dbapi.OperationalError("database is locked")]

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    async with storage.transaction() as session:
        await storage.get_state(key)  # begins it
        event.listen(engine, "do_connect", fail)
        outside = contextvars.Context().run(asyncio.ensure_future, storage.get_state(key))
        assert await outside == "Form:name"
        assert session.in_transaction()
    assert failures == []


@on_postgresql
async def test_connections_that_the_server_closed_are_replaced(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 2, "max_overflow": 0})
    await storage.set_state(key, "Form:name")
    pid = await storage.run_sync(
        lambda session: session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar()
    )
    other = await open_storage(backend)
    await other.run_sync(
        lambda session: (
            session.connection().exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 10000)").all()
        )
    )
    async with anyio.create_task_group() as calls:
        for _ in range(8):
            calls.start_soon(storage.get_state, key)
    assert await storage.get_state(key) == "Form:name"


@on_every_driver
async def test_connections_beyond_the_pools_size_are_closed_again(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 4})
    for _ in range(5):
        async with anyio.create_task_group() as calls:
            for number in range(12):
                other = replace(key, user_id=number)
                calls.start_soon(storage.set_state, other, "Form:name")
                calls.start_soon(storage.get_data, other)
    used: Any = engine_of(storage).pool
    assert used.checkedin() == 1
    assert used.checkedout() == 0


tenant: ContextVar[str] = ContextVar("tenant")


@on_every_driver
async def test_a_listener_has_the_context_of_the_caller(
    storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    seen: list[str | None] = []
    event.listen(
        engine_of(storage), "before_cursor_execute", lambda *_: seen.append(tenant.get(None))
    )

    async def call(name: str) -> None:
        tenant.set(name)
        await storage.get_state(key)

    for name in ("one", "two"):
        async with anyio.create_task_group() as calls:
            calls.start_soon(call, name)
    assert seen == ["one", "two"]
