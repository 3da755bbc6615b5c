"""The first call on an engine asks whether a pooler stands before it, and changes nothing else."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from conftest import Open, dispose, drop_table
from sqlalchemy import URL, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool, StaticPool

from hybrid_storage import SQLAlchemyStorage

pytestmark = pytest.mark.parametrize("backend", POSTGRESQL, ids=str)

PID = "SELECT pg_backend_pid()"


def synchronous(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def ask(driver_connection: Any, statement: str) -> Any:
    """Execute a statement where SQLAlchemy does not see it, and leave its transaction open."""
    cursor = driver_connection.cursor()
    cursor.execute(statement)
    row = cursor.fetchone()
    cursor.close()
    return row[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"poolclass": NullPool},
        {"poolclass": StaticPool},
        {"pool_size": 1, "max_overflow": 0},
        {"isolation_level": "AUTOCOMMIT"},
    ],
    ids=["pool", "no pool", "one connection for all", "pool of one", "autocommit"],
)
async def test_it_asks_once(
    backend: Backend, options: dict[str, Any], postgres_url: URL, key: StorageKey
) -> None:
    """Even where sessions are bound to engines with options of their own."""
    engine = backend.engine(postgres_url, **options)
    asked: list[str] = []
    event.listen(
        synchronous(engine), "before_cursor_execute", lambda *arguments: asked.append(arguments[2])
    )
    factory = backend.factory(engine)
    storage = SQLAlchemyStorage(factory, table_name=f"fsm_{uuid.uuid4().hex}")
    await storage.create_table()
    for number in range(3):
        factory.configure(bind=engine.execution_options(number=number))
        await storage.set_state(key, "Form:name")
    assert asked.count(PID) == 1
    await drop_table(storage, engine)


async def test_a_connection_that_the_pool_has_lost_is_replaced(
    backend: Backend, open_storage: Open, key: StorageKey, postgres_url: URL
) -> None:
    """The application has used it before the storage makes its first call."""
    storage = await open_storage(backend)
    engine = backend.engine(postgres_url, pool_size=1, max_overflow=0)
    pids: list[int] = []
    event.listen(synchronous(engine), "connect", lambda driver, _: pids.append(ask(driver, PID)))
    other = SQLAlchemyStorage(backend.factory(engine), table_name=storage.table.name)
    if isinstance(engine, AsyncEngine):
        await (await engine.connect()).close()
    else:
        engine.connect().close()
    kill = f"SELECT pg_terminate_backend({pids[0]}, 5000)"
    await storage.run_sync(lambda session: session.connection().exec_driver_sql(kill))
    await other.set_state(key, "Form:name")
    assert len(pids) == 2
    await dispose(engine)


async def test_what_a_listener_of_the_pool_has_set_is_not_undone(
    backend: Backend, open_storage: Open, key: StorageKey, postgres_url: URL
) -> None:
    """It has begun a transaction with that, as one that sets a tenant's schema does."""
    storage = await open_storage(backend)
    await storage.set_state(key, "Form:name")
    engine = backend.engine(postgres_url)
    setting = "SELECT set_config('search_path', 'pg_catalog', false)"
    event.listen(synchronous(engine).pool, "checkout", lambda driver, *_: ask(driver, setting))
    other = SQLAlchemyStorage(backend.factory(engine), table_name=storage.table.name)
    with pytest.raises(DBAPIError, match="is missing"):
        await other.get_state(key)
    await dispose(engine)


async def test_a_server_that_cannot_tell_is_taken_for_no_pooler(
    backend: Backend, open_storage: Open, key: StorageKey, postgres_url: URL
) -> None:
    """Some speak PostgreSQL's protocol, and do not know all of its functions."""
    storage = await open_storage(backend)
    engine = backend.engine(postgres_url)

    def misspell(*arguments: Any) -> tuple[str, Any]:
        _, _, statement, parameters, *_ = arguments
        return statement.replace("pg_backend_pid", "no_such_function"), parameters

    event.listen(synchronous(engine), "before_cursor_execute", misspell, retval=True)
    other = SQLAlchemyStorage(backend.factory(engine), table_name=storage.table.name)
    for _ in range(2):
        await other.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"
    await dispose(engine)
