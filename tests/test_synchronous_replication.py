"""A commit that waits for a standby, and whose connection is lost meanwhile, is not acknowledged.

PostgreSQL ends the wait and not the commit: others see what no standby may have. The storage is not
to take it for written, or a failover would lose it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from blocking import until
from chaos.servers import Server, postgres
from conftest import dispose
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.pool import NullPool

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

KEY = StorageKey(bot_id=42, chat_id=7, user_id=7)
WAITS = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


class Standby:
    """A synchronous standby that a server waits for in vain."""

    def __init__(self, server: Server) -> None:
        self._engine: Engine = create_engine(
            server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Have commits wait for it until the end of the context."""
        self._set("'nobody'")
        try:
            yield
        finally:
            self._set("''")

    async def interrupt(self, times: int) -> None:
        """Wait until a commit waits for it, and kill its connection, again and again."""
        for _ in range(times):
            await until(lambda: bool(self._ask(f"SELECT count(*) {WAITS}")))
            self._ask(f"SELECT count(pg_terminate_backend(pid)) {WAITS}")

    def _set(self, names: str) -> None:
        with self._engine.connect() as connection:
            self._run(connection, f"ALTER SYSTEM SET synchronous_standby_names = {names}")
            self._run(connection, "SELECT pg_reload_conf()")

    def _ask(self, statement: str) -> object:
        with self._engine.connect() as connection:
            # Its own commits do not wait.
            self._run(connection, "SET synchronous_commit = local")
            return connection.exec_driver_sql(statement).scalar()

    @staticmethod
    def _run(connection: Connection, statement: str) -> None:
        connection.exec_driver_sql(statement)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Return a PostgreSQL server whose settings may be changed."""
    with TemporaryDirectory() as folder, postgres(Path(folder)).running() as server:
        yield server


@pytest.fixture
def standby(server: Server) -> Standby:
    """Return the standby that is not there."""
    return Standby(server)


@pytest.fixture
async def opened(
    backend: Backend, server: Server
) -> AsyncIterator[tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation]]:
    """Return a storage, and its isolation with a unit of work."""
    engine = backend.engine(server.url)
    storage: SQLAlchemyStorage = SQLAlchemyStorage(backend.factory(engine))
    isolation = storage.create_isolation(
        unit_of_work=True, driver_statements=backend.driver_statements
    )
    await storage.create_table()
    await storage.set_data(KEY, {"n": 1})
    yield storage, isolation
    await isolation.close()
    await dispose(engine)


@asynccontextmanager
async def unacknowledged(
    standby: Standby, write: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """Begin a write whose connections are killed, and end it when the standby is needed no more."""
    with standby.awaited():
        task = asyncio.ensure_future(write())
        await standby.interrupt(times=3)
        yield
        await anyio.sleep(0.2)
        assert not task.done()
    await task


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_a_write_is_not_acknowledged_while_no_standby_has_it(
    standby: Standby, opened: tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation]
) -> None:
    """A repeated clear() finds nothing to delete, and a commit of nothing does not wait."""
    storage, _ = opened
    async with unacknowledged(standby, lambda: storage.clear(KEY)):
        await until_is(storage, {})
    assert await storage.get_data(KEY) == {}


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_an_update_is_not_acknowledged_while_no_standby_has_it(
    standby: Standby, opened: tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation]
) -> None:
    """The lock's row tells that it was written, and not that a standby has that."""
    storage, isolation = opened
    ends = asyncio.Event()

    async def update() -> None:
        async with isolation.lock(KEY):
            data = await storage.get_data(KEY)
            await storage.set_data(KEY, {"n": data["n"] + 1})
            ends.set()
            await anyio.sleep(0.1)

    task = asyncio.ensure_future(update())
    await ends.wait()

    async with unacknowledged(standby, lambda: task):
        await until_is(storage, {"n": 2})
    assert await storage.get_data(KEY) == {"n": 2}


async def until_is(storage: SQLAlchemyStorage, data: dict[str, int]) -> None:
    """Wait until others see what the storage has not acknowledged."""
    with anyio.fail_after(10):
        while await storage.get_data(KEY) != data:  # noqa: ASYNC110
            await anyio.sleep(0.01)
