"""A commit that waits for a standby, and whose connection is lost meanwhile, is not acknowledged.

PostgreSQL ends the wait and not the commit: others see what no standby may have. The storage is not
to take it for written, or a failover would lose it.
"""

from __future__ import annotations

import asyncio
import uuid
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
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
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
async def engine(backend: Backend, server: Server) -> AsyncIterator[Engine | AsyncEngine]:
    """Return an engine."""
    engine = backend.engine(server.url)
    yield engine
    await dispose(engine)


@pytest.fixture
async def opened(
    backend: Backend, engine: Engine | AsyncEngine
) -> AsyncIterator[tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation]]:
    """Return a storage, and its isolation with a unit of work."""
    storage: SQLAlchemyStorage = SQLAlchemyStorage(backend.factory(engine))
    isolation = storage.create_isolation(
        unit_of_work=True, driver_statements=backend.driver_statements
    )
    await storage.create_table()
    await storage.set_data(KEY, {"n": 1})
    yield storage, isolation
    await isolation.close()


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
async def test_a_listener_for_transactions_changes_nothing_about_that(
    standby: Standby,
    opened: tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation],
    engine: Engine | AsyncEngine,
) -> None:
    """Then each call has a transaction around it, whose end is to wait."""
    storage, _ = opened
    synchronous = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    event.listen(synchronous, "begin", lambda connection: None)
    async with unacknowledged(standby, lambda: storage.clear(KEY)):
        await until_is(storage, {})


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_without_synchronous_standbys_a_repeated_write_needs_no_rights_of_its_own(
    server: Server,
    opened: tuple[SQLAlchemyStorage, SQLAlchemyEventIsolation],
    engine: Engine | AsyncEngine,
) -> None:
    storage, _ = opened
    role = f"r{uuid.uuid4().hex}"
    owner = create_engine(server.url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        functions = (
            "SELECT oid::regprocedure FROM pg_proc WHERE proname = 'pg_logical_emit_message'"
        )
        for statement in (
            *(
                f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC"
                for function in connection.exec_driver_sql(functions).scalars()
            ),
            f"CREATE ROLE {role}",
            f"GRANT ALL ON {storage.table.name} TO {role}",
        ):
            connection.exec_driver_sql(statement)
    owner.dispose()
    failures = iter([ConnectionError("the first attempt fails")])

    def become(connection: Connection, *_: object) -> None:
        for failure in failures:
            raise failure
        cursor = connection.connection.cursor()
        cursor.execute(f"SET ROLE {role}")
        cursor.close()

    synchronous = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    event.listen(synchronous, "before_cursor_execute", become)
    await storage.set_data(KEY, {"n": 2})
    assert await storage.get_data(KEY) == {"n": 2}


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
