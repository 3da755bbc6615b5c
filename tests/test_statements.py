"""Statements by the driver: whoever listens misses none, and connections come back as they were."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import anyio
import greenlet  # type: ignore[import-untyped]
import pytest
from aiogram.fsm.storage.base import StorageKey
from blocking import locked
from conftest import Open, dispose, engine_of, every_call, give_up, in_session
from sqlalchemy import (
    URL,
    Connection,
    Dialect,
    Engine,
    MetaData,
    String,
    TypeDecorator,
    __version__,
    event,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn
from ways import POSTGRESQL, SERVERS, SQLITE, Way

from hybrid_storage import FSMData, SQLAlchemyStorage, _checkouts


def pool(way: Way, **options: Any) -> dict[str, Any]:
    """Return an engine's options for a pool: aiosqlite had none by default."""
    return {"poolclass": AsyncAdaptedQueuePool if way.is_async else QueuePool, **options}


LISTENED_TO: dict[str, Any] = {"its engine": None, "all engines": Engine}
if not __version__.startswith("2.0."):  # which does not call who listens to all connections
    LISTENED_TO["all connections"] = Connection

on_every_driver = pytest.mark.parametrize("way", SERVERS, ids=str)
on_postgresql = pytest.mark.parametrize("way", POSTGRESQL, ids=str)


@pytest.mark.parametrize("target", LISTENED_TO.values(), ids=LISTENED_TO)
@on_every_driver
async def test_a_listener_that_comes_late_sees_every_statement(
    target: Any,
    storage: SQLAlchemyStorage,
    key: StorageKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The mark that somebody has listened to all connections outlives the listener.
    monkeypatch.setattr(Connection, "_has_events", False, raising=False)
    await every_call(storage, key)
    seen: list[str] = []

    def see(*args: Any) -> None:
        seen.append(args[2])

    where = (target or engine_of(storage), "before_cursor_execute", see)
    event.listen(*where)
    await every_call(storage, key)
    event.remove(*where)
    for verb in ("INSERT", "SELECT", "UPDATE", "DELETE"):
        assert any(text.startswith(verb) for text in seen), verb


@on_every_driver
async def test_a_log_of_the_statements_has_the_storages(
    storage: SQLAlchemyStorage, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    await storage.set_state(key, "Form:name")
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"):
        await storage.set_state(key, "Form:age")
    assert "INSERT INTO" in caplog.text


@on_every_driver
async def test_what_an_application_sets_for_the_engine_is_obeyed(
    way: Way, url_of: Callable[[Way], URL], key: StorageKey, open_storage: Open
) -> None:
    other = await open_storage(way, table_name="fsm_other")
    renamed = {"nowhere": None}
    engine: Any = way.engine(url_of(way)).execution_options(schema_translate_map=renamed)
    metadata = MetaData(schema="nowhere")
    storage = SQLAlchemyStorage(way.factory(engine), metadata, table_name="fsm_other")
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


@pytest.mark.parametrize("way", [*SQLITE, *POSTGRESQL], ids=str)
async def test_a_columns_own_type_sees_what_is_written_and_read(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "reversed_conversation"

        state: Mapped[str | None] = mapped_column(Reversed())

    storage = await open_storage(way, table_name=Conversation)
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"
    stored = await in_session(
        storage,
        lambda session: (
            session.connection().exec_driver_sql("SELECT state FROM reversed_conversation").scalar()
        ),
    )
    assert stored == "eman:mroF"


@on_every_driver
async def test_a_function_that_gives_a_columns_value_is_called(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    numbers = iter(range(1, 100))

    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = "counted_conversation"

        writes: Mapped[int] = mapped_column(default=lambda: next(numbers))

    storage = await open_storage(way, table_name=Conversation)
    await storage.set_state(key, "Form:name")
    count = await in_session(storage, lambda session: session.query(Conversation.writes).scalar())
    assert count == 1


def autocommits(session: Session) -> bool:
    connection: Any = session.connection().connection.dbapi_connection
    return bool(connection.autocommit)


@on_postgresql
async def test_a_connection_comes_back_without_autocommit(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options={"pool_size": 1, "max_overflow": 0})
    await storage.set_state(key, "Form:name")
    assert not await in_session(storage, autocommits)
    await storage.update_data(key, {"name": "Ada"})
    assert not await in_session(storage, autocommits)
    await in_session(storage, lambda session: storage.table.drop(session.connection()))
    with pytest.raises(DBAPIError, match=storage.table.name):
        await storage.get_state(key)
    assert not await in_session(storage, autocommits)


@on_postgresql
@pytest.mark.parametrize(
    "options",
    [{"pool_pre_ping": True}, {"pool_recycle": 0}, {"isolation_level": "AUTOCOMMIT"}],
    ids=lambda options: next(iter(options)),
)
async def test_an_engines_own_settings_are_no_obstacle(
    way: Way, options: dict[str, Any], open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options=options)
    for _ in range(3):
        await every_call(storage, key)


@on_postgresql
async def test_a_pools_listener_may_wait_for_the_driver(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way)
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
    way: Way, by: str, when: str, url_of: Callable[[Way], URL], open_storage: Open, key: StorageKey
) -> None:
    def look(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.close()

    table_name = (await open_storage(way)).table.name
    engine: Any = way.engine(url_of(way))
    event.listen(getattr(engine, "sync_engine", engine), when, look)
    if by == "SQLAlchemy":
        event.listen(getattr(engine, "sync_engine", engine), "after_execute", lambda *_: None)
    storage = SQLAlchemyStorage(way.factory(engine), table_name=table_name)
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
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    options = pool(way, pool_reset_on_return=None, pool_size=2, max_overflow=0)
    storage = await open_storage(way, engine_options=options)
    other = await open_storage(way, table_name=storage.table.name)
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"
    await other.set_state(key, "Form:age")
    assert await storage.get_state(key) == "Form:age"
    await storage.clear(key)


async def test_a_connection_whose_statement_timed_out_is_given_up(
    url_of: Callable[[Way], URL], open_storage: Open, key: StorageKey
) -> None:
    way = next(each for each in POSTGRESQL if each.driver == "asyncpg")
    options = {"connect_args": {"command_timeout": 0.3}}
    storage = await open_storage(way, engine_options=options, retry_for=0)
    await storage.set_state(key, "old")
    closed: list[object] = []
    event.listen(engine_of(storage), "invalidate", lambda *_: closed.append(None))
    with locked(way, url_of(way), storage, key), pytest.raises(asyncio.TimeoutError):
        await storage.set_state(key, "new")
    assert len(closed) == 1
    # The server may have been told to cancel it, or may finish it.
    assert await storage.get_state(key) in ("old", "new")


@pytest.mark.parametrize("way", POSTGRESQL[2:], ids=str)
@pytest.mark.parametrize("options", [{}, {"pool_pre_ping": True}, {"pool_recycle": 3600}], ids=str)
async def test_asyncpg_takes_a_free_connection_without_a_greenlet(
    way: Way, options: dict[str, Any], open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options=options)
    await storage.set_state(key, "Form:name")
    switches: list[object] = []
    greenlet.settrace(lambda event, args: switches.append((event, args)))
    try:
        assert await storage.get_state(key) == "Form:name"
    finally:
        greenlet.settrace(None)
    may_wait = options or not _checkouts._QUEUE_GIVES_AT_ONCE
    assert bool(switches) == bool(may_wait)


@on_postgresql
async def test_a_connection_that_was_given_up_is_opened_anew(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options={"pool_size": 1, "max_overflow": 0})
    await storage.set_state(key, "Form:name")
    await in_session(storage, give_up)
    assert await storage.get_state(key) == "Form:name"


@pytest.mark.parametrize("way", POSTGRESQL[2:], ids=str)
async def test_a_connection_that_the_application_opens_itself_is_opened_anew(
    way: Way, url_of: Callable[[Way], URL], open_storage: Open, key: StorageKey
) -> None:
    other: Any = way.engine(url_of(way))
    arguments, keywords = other.dialect.create_connect_args(other.url)

    def connect() -> Any:
        return other.dialect.connect(*arguments, **keywords)

    options = {"creator": connect, "pool_size": 1, "max_overflow": 0}
    storage = await open_storage(way, engine_options=options)
    for _ in range(2):
        await every_call(storage, key)
        await in_session(storage, give_up)


@pytest.mark.parametrize("way", POSTGRESQL[2:], ids=str)
async def test_a_transaction_that_a_listener_has_ended_in_its_own_way_is_none(
    way: Way, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLAlchemy goes on taking it for begun, and would wait for its end."""
    storage = await open_storage(way, engine_options={"pool_size": 1, "max_overflow": 0})

    def look(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        cursor.execute("COMMIT")
        cursor.close()

    event.listen(engine_of(storage), "connect", look)
    await in_session(storage, give_up)
    await every_call(storage, key)
    assert "MissingGreenlet" not in caplog.text


@pytest.mark.parametrize("way", POSTGRESQL[2:], ids=str)
async def test_a_listener_that_connects_may_wait_for_it(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options={"pool_size": 1, "max_overflow": 0})
    mine = engine_of(storage).dialect

    def connect(dialect: Any, _: object, arguments: Any, keywords: Any) -> Any:
        return dialect.connect(*arguments, **keywords) if dialect is mine else None

    await every_call(storage, key)
    event.listen(Engine, "do_connect", connect)
    try:
        for _ in range(2):
            await in_session(storage, give_up)
            await every_call(storage, key)
    finally:
        event.remove(Engine, "do_connect", connect)


@pytest.mark.parametrize("way", POSTGRESQL[2:], ids=str)
async def test_an_engine_may_be_disposed_while_calls_run(
    way: Way, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(way, engine_options={"pool_size": 1, "max_overflow": 5})
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
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    options = pool(way, pool_size=1, max_overflow=0)
    storage = await open_storage(way, engine_options=options)
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
async def test_a_connection_that_the_server_closed_is_replaced(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options={"pool_size": 2, "max_overflow": 0})
    await storage.set_state(key, "Form:name")
    await in_session(
        storage,
        lambda session: (
            session.connection()
            .exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
            .all()
        ),
    )
    async with anyio.create_task_group() as calls:
        for _ in range(8):
            calls.start_soon(storage.get_state, key)
    assert await storage.get_state(key) == "Form:name"


@on_every_driver
async def test_connections_beyond_the_pools_size_are_closed_again(
    way: Way, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(way, engine_options=pool(way, pool_size=1, max_overflow=4))
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


@on_every_driver
async def test_a_statement_is_compiled_once(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    for _ in range(5):
        await storage.get_state(key)
    plain = storage._runner._plain
    assert plain is not None
    assert len(plain.texts) == 1
