"""Drivers that nobody has told of PgBouncer: it works, or the first call says what to set."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from chaos.drivers import BEHIND_PGBOUNCER
from chaos.servers import (
    PGBOUNCER,
    PREPARING,
    PREPARING_PGBOUNCER,
    Server,
    pgbouncer,
    postgres,
)
from conftest import dispose
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from hybrid_storage import SQLAlchemyStorage

SETTINGS = r"statement_cache_size.*prepared_statement_cache_size.*prepared_statement_name_func"
ASYNCPG = POSTGRESQL[2]
FEW = {"default_pool_size": 3}  # so that servers are shared
OLD: tuple[Any, ...] = PGBOUNCER, FEW
NEW: tuple[Any, ...] = PREPARING_PGBOUNCER, {**FEW, **PREPARING}
BY_SESSION: tuple[Any, ...] = PGBOUNCER, {"pool_mode": "session", "default_pool_size": 40}
ONE_SESSION: tuple[Any, ...] = PGBOUNCER, {"pool_mode": "session", "default_pool_size": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Return a PostgreSQL server."""
    with TemporaryDirectory() as folder, postgres(Path(folder) / "data").running() as server:
        yield server


@pytest.fixture
def pooler(request: pytest.FixtureRequest, server: Server) -> Iterator[Server]:
    """Return a PgBouncer: which, and its settings."""
    program, settings = request.param
    with (
        TemporaryDirectory() as folder,
        pgbouncer(Path(folder), server, program, **settings).running() as pooler,
    ):
        yield pooler


@asynccontextmanager
async def opened(
    backend: Backend, pooler: Server, **options: Any
) -> AsyncIterator[SQLAlchemyStorage]:
    engine = backend.engine(pooler.url, **options)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    try:
        yield storage
    finally:
        await dispose(engine)


async def works(storage: SQLAlchemyStorage, *, driver_statements: bool) -> None:
    """Have many conversations at once, in every form."""
    isolation = storage.create_isolation(unit_of_work=True, driver_statements=driver_statements)
    await storage.create_table()

    async def converse(number: int) -> None:
        plain, together, unit = (
            StorageKey(bot_id=42, chat_id=number, user_id=user) for user in (1, 2, 3)
        )
        for count in range(1, 6):
            await storage.update_data(plain, {str(count): count})
            assert len(await storage.get_data(plain)) == count
            async with storage.transaction():
                await storage.update_data(together, {str(count): count})
                await storage.set_state(together, f"Form:{count}")
            assert await storage.get_state(together) == f"Form:{count}"
            async with isolation.lock(unit):
                data = await storage.get_data(unit)
                await storage.set_data(unit, {"count": data.get("count", 0) + 1})
            assert await storage.get_data(unit) == {"count": count}

    await asyncio.gather(*map(converse, range(8)))
    await isolation.close()


@pytest.mark.parametrize("pooler", [pytest.param(OLD, id="1.18")], indirect=True)
async def test_the_first_call_names_the_settings_that_asyncpg_lacks(
    pooler: Server, key: StorageKey
) -> None:
    """Even where nobody else uses the pooler, so that nothing would be mixed up yet."""
    async with opened(ASYNCPG, pooler) as storage:
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(ArgumentError, match=SETTINGS):
                await storage.get_state(key)
            with pytest.raises(ArgumentError, match=SETTINGS):
                async with storage.transaction():
                    raise AssertionError("it has begun")
            with pytest.raises(ArgumentError, match=SETTINGS):
                await storage.run_sync(lambda session: None)
        assert time.monotonic() - began < 10  # nothing of it was retried


@pytest.mark.parametrize("lacking", sorted(BEHIND_PGBOUNCER["asyncpg"]))
@pytest.mark.parametrize("pooler", [pytest.param(OLD, id="1.18")], indirect=True)
async def test_part_of_the_settings_works_or_is_refused(
    pooler: Server, lacking: str, key: StorageKey
) -> None:
    settings = dict(BEHIND_PGBOUNCER["asyncpg"])
    del settings[lacking]
    async with opened(ASYNCPG, pooler, connect_args=settings) as storage:
        if lacking == "statement_cache_size":  # of which SQLAlchemy's statements know nothing
            await storage.create_table()
            await storage.set_state(key, "Form:name")
        else:
            with pytest.raises(ArgumentError, match=SETTINGS):
                await storage.create_table()


@pytest.mark.parametrize("driver_statements", [False, True])
@pytest.mark.parametrize(
    ("pooler", "options"),
    [
        pytest.param(OLD, BEHIND_PGBOUNCER["asyncpg"], id="1.18, told"),
        pytest.param(NEW, BEHIND_PGBOUNCER["asyncpg"], id="1.21, told"),
        pytest.param(NEW, {}, id="1.21"),
        pytest.param(BY_SESSION, {}, id="by session"),
    ],
    indirect=["pooler"],
)
async def test_asyncpg_works(
    pooler: Server, options: dict[str, Any], driver_statements: bool
) -> None:
    async with opened(ASYNCPG, pooler, connect_args=options) as storage:
        await works(storage, driver_statements=driver_statements)


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
@pytest.mark.parametrize("pooler", [pytest.param(ONE_SESSION, id="by session")], indirect=True)
async def test_a_pooler_without_servers_to_spare_works(
    pooler: Server, backend: Backend, key: StorageKey
) -> None:
    """Nothing waits for a second server for as long as the pooler lets it: two minutes."""
    began = time.monotonic()
    async with opened(backend, pooler, pool_size=1, max_overflow=0) as storage:
        await storage.create_table()
        await storage.set_state(key, "Form:name")
        assert await storage.get_state(key) == "Form:name"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("backend", POSTGRESQL[:2], ids=str)
@pytest.mark.parametrize("pooler", [pytest.param(OLD, id="1.18")], indirect=True)
async def test_psycopg_is_told_in_sessions_that_choose_their_engine(
    pooler: Server, backend: Backend, key: StorageKey
) -> None:
    """They check out their connections themselves, as lock_sync() does."""
    thresholds: list[int | None] = []

    def note(connection: Connection, *_: object) -> None:
        driver: Any = connection.connection.driver_connection
        thresholds.append(driver.prepare_threshold)

    engine = backend.engine(pooler.url, poolclass=NullPool)
    synchronous = engine.sync_engine if isinstance(engine, AsyncEngine) else engine

    class Choosing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Engine:
            return synchronous

    event.listen(Choosing, "after_begin", lambda *_: None)
    factory: Any = sessionmaker(class_=Choosing)
    if backend.is_async:
        factory = async_sessionmaker(sync_session_class=Choosing)
    storage = SQLAlchemyStorage(factory, table_name=f"fsm_{uuid.uuid4().hex}")
    isolation = storage.create_isolation()
    await storage.create_table()
    event.listen(synchronous, "before_cursor_execute", note)
    await storage.set_state(key, "Form:name")
    if not backend.is_async:

        def hold() -> None:
            with isolation.lock_sync(key):
                pass

        await asyncio.to_thread(hold)
    await isolation.close()
    assert set(thresholds) == {None}
    await dispose(engine)


@pytest.mark.parametrize("backend", POSTGRESQL[:2], ids=str)
@pytest.mark.parametrize(
    "pooler", [pytest.param(OLD, id="1.18"), pytest.param(NEW, id="1.21")], indirect=True
)
async def test_psycopg_works_without_settings(
    pooler: Server, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(backend, pooler) as storage:
        await works(storage, driver_statements=False)
    assert not caplog.records  # nothing was made again
