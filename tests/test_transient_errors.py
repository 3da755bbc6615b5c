"""Which errors pass by themselves, shown with real ones of real servers, and how calls survive."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import asyncpg
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from anyio.lowlevel import checkpoint
from backends import IS_MARIADB, SERVERS, Backend
from blocking import locked, until
from chaos.drivers import IMPATIENCE, small_pool
from chaos.proxy import Proxy, free_port
from chaos.servers import postgres
from conftest import Open
from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage._engine.errors import is_transient

NETWORKS = [backend for backend in SERVERS if backend.server != "sqlite"]
HANG = 30  # seconds after which a test is taken to hang
in_thread = partial(to_thread.run_sync, abandon_on_cancel=True)


class Client:
    """A connection, of a synchronous or an asynchronous engine."""

    def __init__(self, connection: Connection | AsyncConnection) -> None:
        self._connection = connection

    async def run(self, sql: str) -> Any:
        """Execute a statement.

        :return: the first column of its first row, if it has one
        """
        connection = self._connection
        if isinstance(connection, AsyncConnection):
            result = await connection.exec_driver_sql(sql)
        else:
            result = await in_thread(connection.exec_driver_sql, sql)
        return result.scalar() if result.returns_rows else None

    async def commit(self) -> None:
        """Commit the transaction that the first statement began."""
        if isinstance(self._connection, AsyncConnection):
            await self._connection.commit()
        else:
            await in_thread(self._connection.commit)

    async def close(self) -> None:
        """Give the connection back."""
        if isinstance(self._connection, AsyncConnection):
            await self._connection.close()
        else:
            await in_thread(self._connection.close)


class Lab:
    """A table of two rows on a backend's server, and connections to make trouble with."""

    def __init__(self, backend: Backend, url: URL) -> None:
        self.backend = backend
        self.url = url
        self.table = f"trouble_{uuid.uuid4().hex}"
        self.is_postgresql = backend.server == "postgresql"
        self._engines: list[Engine | AsyncEngine] = []
        self._clients: list[Client] = []

    async def connect(self, url: URL | None = None, **options: Any) -> Client:
        """Connect with an engine of its own.

        :param url: where to, by default the backend's server
        :param options: the engine's
        """
        return await self.connect_by(self.backend.engine(url or self.url, **options))

    async def connect_by(self, engine: Engine | AsyncEngine) -> Client:
        """Connect with an engine, which is disposed at the end."""
        self._engines.append(engine)
        if isinstance(engine, AsyncEngine):
            client = Client(await engine.connect())
        else:
            client = Client(await in_thread(engine.connect))
        self._clients.append(client)
        return client

    @asynccontextmanager
    async def role(self, options: str = "") -> AsyncIterator[URL]:
        """Create a role, and drop it at the end of the context.

        :param options: those of ``CREATE USER``
        :return: the URL to log in with it
        """
        admin, name = await self.connect(), f"r_{uuid.uuid4().hex[:16]}"
        await admin.run(f"CREATE USER {name} {options}")
        await admin.commit()
        try:
            yield self.url.set(
                username=name,
                database=self.url.database if self.is_postgresql else "information_schema",
            )
        finally:
            await admin.run(f"DROP USER {name}")
            await admin.commit()

    async def fill(self) -> None:
        """Create the table."""
        client = await self.connect()
        await client.run(f"CREATE TABLE {self.table} (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)")
        await client.run(f"INSERT INTO {self.table} VALUES (1, 1), (2, 2)")
        await client.commit()

    async def close(self) -> None:
        """Drop the table and disconnect."""
        for client in self._clients:
            with suppress(DBAPIError):
                await client.close()
        await self._disconnect()
        client = await self.connect()
        await client.run(f"DROP TABLE {self.table}")
        await client.commit()
        await client.close()
        await self._disconnect()

    async def _disconnect(self) -> None:
        for engine in self._engines:
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
            else:
                engine.dispose()

    def write(self, row: int = 1) -> str:
        """Return a statement that locks a row."""
        return f"UPDATE {self.table} SET n = n + 1 WHERE id = {row}"


@pytest.fixture
async def lab(backend: Backend, url_of: Callable[[Backend], URL]) -> AsyncIterator[Lab]:
    """Return a place to make trouble in."""
    lab = Lab(backend, url_of(backend))
    await lab.fill()
    yield lab
    await lab.close()


Trouble = Callable[[Lab], Awaitable[object]]

# What passes


async def terminated_while_idle(lab: Lab) -> None:
    victim, other = await lab.connect(), await lab.connect()
    if lab.is_postgresql:
        pid = await victim.run("SELECT pg_backend_pid()")
        await other.run(f"SELECT pg_terminate_backend({pid}, 10000)")
    else:
        await other.run(f"KILL {await victim.run('SELECT CONNECTION_ID()')}")
    await victim.run("SELECT 1")


async def terminated_in_a_statement(lab: Lab) -> None:
    victim, other = await lab.connect(), await lab.connect()
    if lab.is_postgresql:
        pid = await victim.run("SELECT pg_backend_pid()")
        sleep, kill = "SELECT pg_sleep(60)", f"SELECT pg_terminate_backend({pid}, 10000)"
        sleeps = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
    else:
        pid = await victim.run("SELECT CONNECTION_ID()")
        sleep, kill = "SELECT SLEEP(60)", f"KILL {pid}"
        sleeps = (
            f"SELECT 1 FROM information_schema.processlist WHERE id = {pid} AND info = '{sleep}'"
        )

    async def terminate() -> None:
        while not await other.run(sleeps):
            await checkpoint()
        await other.run(kill)

    await both(victim.run(sleep), terminate())


async def idle_for_too_long(lab: Lab) -> None:
    client = await lab.connect()
    if lab.is_postgresql:
        await client.run("SET idle_session_timeout = 50")
        await client.commit()
    else:
        await client.run("SET wait_timeout = 1")
    await anyio.sleep(0.5 if lab.is_postgresql else 1.5)
    await client.run("SELECT 1")


async def idle_in_a_transaction_for_too_long(lab: Lab) -> None:
    client = await lab.connect()
    await client.run("SET idle_in_transaction_session_timeout = 50")
    await anyio.sleep(0.5)
    await client.run("SELECT 1")


async def nobody_listens(lab: Lab) -> None:
    await lab.connect(connect_args={"host": "127.0.0.1", "port": free_port()})


async def no_socket(lab: Lab) -> None:
    await lab.connect(connect_args={"host": "/nowhere"})


async def hung_up_on(lab: Lab) -> None:
    """By a proxy in front of a server that is down."""
    with Proxy(("127.0.0.1", free_port())) as proxy:
        await lab.connect(connect_args={"host": "127.0.0.1", "port": proxy.port})


async def no_answer_to_the_connection(lab: Lab) -> None:
    timeout = {"psycopg": "connect_timeout", "asyncpg": "timeout"}.get(
        lab.backend.driver, "read_timeout"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        await lab.connect(connect_args={"host": "127.0.0.1", "port": port, timeout: 1})


async def no_answer_to_a_statement(lab: Lab) -> None:
    timeout = "command_timeout" if lab.is_postgresql else "read_timeout"
    client = await lab.connect(connect_args={timeout: 1})
    await client.run("SELECT pg_sleep(60)" if lab.is_postgresql else "SELECT SLEEP(60)")


async def deadlock(lab: Lab) -> None:
    one, other = await lab.connect(), await lab.connect()
    await one.run(lab.write(1))
    await other.run(lab.write(2))
    await both(one.run(lab.write(2)), other.run(lab.write(1)))


async def serialization_failure(lab: Lab) -> None:
    one = await lab.connect(isolation_level="REPEATABLE READ")
    if not lab.is_postgresql:
        await one.run("SET innodb_snapshot_isolation = ON")
    await one.run(f"SELECT n FROM {lab.table} WHERE id = 1")
    other = await lab.connect()
    await other.run(lab.write())
    await other.commit()
    await one.run(lab.write())


async def lock_timeout(lab: Lab) -> None:
    one, other = await lab.connect(), await lab.connect()
    await one.run(lab.write())
    await other.run(
        "SET lock_timeout = 50" if lab.is_postgresql else "SET innodb_lock_wait_timeout = 0"
    )
    await other.run(lab.write())


async def too_many_connections(lab: Lab) -> None:
    options = "CONNECTION LIMIT 0" if lab.is_postgresql else "WITH MAX_USER_CONNECTIONS 1"
    async with lab.role(options) as url:
        await lab.connect(url)
        await lab.connect(url)


async def turned_read_only(lab: Lab) -> None:
    client = await lab.connect()
    await client.run("SET default_transaction_read_only = on")
    await client.commit()
    await client.run(lab.write())


async def pool_exhausted(lab: Lab) -> None:
    options = small_pool(lab.backend.is_async, pool_size=1, max_overflow=0, pool_timeout=0.1)
    engine = lab.backend.engine(lab.url, **options)
    await lab.connect_by(engine)
    await lab.connect_by(engine)


async def busy(lab: Lab) -> None:
    one, other = await lab.connect(), await lab.connect(connect_args={"timeout": 0})
    await one.run(lab.write())
    await other.run(lab.write())


async def busy_at_the_commit(lab: Lab) -> None:
    reader, writer = await lab.connect(), await lab.connect(connect_args={"timeout": 0})
    await reader.run("BEGIN")
    await reader.run(f"SELECT n FROM {lab.table}")
    await writer.run(lab.write())
    await writer.commit()


async def busy_snapshot(lab: Lab) -> None:
    one, other = await lab.connect(), await lab.connect()
    await one.run("PRAGMA journal_mode = WAL")
    await one.run("BEGIN")
    await one.run(f"SELECT n FROM {lab.table}")
    await other.run(lab.write())
    await other.commit()
    await one.run(lab.write())


async def both(one: Awaitable[object], other: Awaitable[object]) -> None:
    """Await two things at once; raise what the first to fail raises when both are done."""
    errors: list[Exception] = []

    async def tried(thing: Awaitable[object]) -> None:
        try:
            await thing
        except Exception as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tried, one)
        tasks.start_soon(tried, other)
    for error in errors:
        raise error


OF_NETWORKS: list[Trouble] = [
    terminated_while_idle,
    terminated_in_a_statement,
    idle_for_too_long,
    nobody_listens,
    hung_up_on,
    no_answer_to_the_connection,
    deadlock,
    serialization_failure,
    lock_timeout,
    too_many_connections,
    pool_exhausted,
]
PASSING: dict[str, list[Trouble]] = {
    "sqlite": [busy, busy_at_the_commit, busy_snapshot, pool_exhausted],
    "postgresql": [
        *OF_NETWORKS,
        idle_in_a_transaction_for_too_long,
        no_socket,
        turned_read_only,
    ],
    "mariadb": [
        *(each for each in OF_NETWORKS if IS_MARIADB or each is not serialization_failure),
        no_answer_to_a_statement,
    ],
    "asyncpg": [no_answer_to_a_statement],  # psycopg has no time-out for a statement
}


def cases(troubles: dict[str, list[Trouble]]) -> list[Any]:
    """Return the parameters of a test: every driver with its troubles."""
    return [
        pytest.param(backend, trouble, id=f"{backend}-{trouble.__name__}")
        for backend in SERVERS
        for trouble in [*troubles[backend.server], *troubles.get(backend.driver, ())]
    ]


async def error_of(trouble: Trouble, lab: Lab) -> Exception:
    """Return what a trouble raises."""
    with anyio.fail_after(HANG):
        try:
            await trouble(lab)
        except Exception as error:
            return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(("backend", "trouble"), cases(PASSING))
async def test_an_error_that_passes_is_transient(lab: Lab, trouble: Trouble) -> None:
    error = await error_of(trouble, lab)
    assert is_transient(error), repr(error)


def test_what_asyncpg_says_between_the_end_of_a_session_and_the_hang_up_is_transient() -> None:
    """Not wrapped by older releases of SQLAlchemy."""
    said = "cannot switch to state {}; another operation ({}) is in progress"
    assert is_transient(asyncpg.InternalClientError(said.format(11, 2)))
    assert not is_transient(asyncpg.InternalClientError(said.format(11, 12)))  # used by two tasks


# What does not pass


async def syntax_error(lab: Lab) -> None:
    await (await lab.connect()).run("SELEC 1")


async def missing_table(lab: Lab) -> None:
    await (await lab.connect()).run("SELECT * FROM no_such_table")


async def missing_column(lab: Lab) -> None:
    await (await lab.connect()).run(f"SELECT no_such_column FROM {lab.table}")


async def not_unique(lab: Lab) -> None:
    await (await lab.connect()).run(f"INSERT INTO {lab.table} VALUES (1, 1)")


async def null_where_none_may_be(lab: Lab) -> None:
    await (await lab.connect()).run(f"UPDATE {lab.table} SET n = NULL")


async def unknown_database(lab: Lab) -> None:
    name = "/no/such/folder" if lab.backend.server == "sqlite" else "no_such_database"
    await lab.connect(lab.url.set(database=name))


async def unknown_role(lab: Lab) -> None:
    await lab.connect(lab.url.set(username="no_such_role"))


async def not_permitted(lab: Lab) -> None:
    if lab.backend.server == "sqlite":
        client = await lab.connect()
        await client.run("PRAGMA query_only = ON")
        await client.run(lab.write())
    elif lab.is_postgresql:
        client = await lab.connect()
        await client.run("SET ROLE pg_monitor")
        await client.run(lab.write())
    else:
        async with lab.role() as url:
            client = await lab.connect(url)
            await client.run(lab.write().replace(lab.table, f"{lab.url.database}.{lab.table}"))


OF_STATEMENTS: list[Trouble] = [
    syntax_error,
    missing_table,
    missing_column,
    not_unique,
    null_where_none_may_be,
    unknown_database,
    not_permitted,
]
LASTING: dict[str, list[Trouble]] = {
    "sqlite": OF_STATEMENTS,
    "postgresql": [*OF_STATEMENTS, unknown_role],
    "mariadb": OF_STATEMENTS,
}


@pytest.mark.parametrize(("backend", "trouble"), cases(LASTING))
async def test_an_error_that_lasts_is_not_transient(lab: Lab, trouble: Trouble) -> None:
    error = await error_of(trouble, lab)
    assert not is_transient(error), repr(error)


@pytest.fixture(scope="module")
def guarded_postgres() -> Iterator[URL]:
    """Return the URL of a PostgreSQL server that asks everyone but ``postgres`` for a password."""
    with TemporaryDirectory() as folder, postgres(Path(folder)).running() as server:
        yield server.url


@pytest.mark.parametrize("backend", NETWORKS, ids=str)
@pytest.mark.parametrize("password", [None, "wrong"], ids=["no password", "a wrong one"])
async def test_a_refused_password_is_not_transient(
    backend: Backend, url_of: Callable[[Backend], URL], guarded_postgres: URL, password: str | None
) -> None:
    url = guarded_postgres if backend.server == "postgresql" else url_of(backend)
    lab = Lab(backend, url.set(username="guest", password=password))
    error = await error_of(Lab.connect, lab)
    assert not is_transient(error), repr(error)


# What the storage makes of it


IN_EVERY_OUTAGE = pytest.mark.parametrize(
    ("backend", "kind"),
    [pytest.param(backend, "locked", id=f"{backend}-locked") for backend in SERVERS]
    + [pytest.param(backend, "unreachable", id=f"{backend}-unreachable") for backend in NETWORKS],
)
SECRET = "s3cret"
# Seconds; MySQL may wait for a lock for a second more than is said.
RETRY_FOR = 0.5 if IS_MARIADB else 3
ROW = "42:-1001234567890:7"  # the id of the row of the key that the tests use

Outage = Callable[[], AbstractContextManager[object]]
OpenTroubled = Callable[..., Awaitable[tuple[SQLAlchemyStorage, Outage]]]


@pytest.fixture
async def open_troubled(
    backend: Backend,
    kind: str,
    url_of: Callable[[Backend], URL],
    proxy: Proxy,
    open_storage: Open,
    key: StorageKey,
) -> OpenTroubled:
    """Return a function that opens a storage with a row, and tells what makes its writes fail."""

    async def open_troubled(**options: Any) -> tuple[SQLAlchemyStorage, Outage]:
        arguments = IMPATIENCE[backend.driver]
        if kind == "unreachable":
            arguments = {"host": "127.0.0.1", "port": proxy.port}
        storage = await open_storage(backend, engine_options={"connect_args": arguments}, **options)
        await storage.set_state(key, "old")
        if kind == "unreachable":
            return storage, proxy.closed
        return storage, partial(locked, backend, url_of(backend), storage, key)

    return open_troubled


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the storage has logged so far."""
    return [record.getMessage() for record in caplog.records if record.name == "hybrid_storage"]


@IN_EVERY_OUTAGE
async def test_calls_outlive_an_outage(open_troubled: OpenTroubled, key: StorageKey) -> None:
    storage, outage = await open_troubled()
    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as calls:
            with outage():
                calls.start_soon(storage.set_state, key, "new")
                calls.start_soon(storage.update_data, key, {"name": "Ada"})
                calls.start_soon(storage.update_data, key, {"age": 36})
                calls.start_soon(storage.get_data, key)
                calls.start_soon(storage.get_state, replace(key, user_id=8))
                calls.start_soon(storage.set_data, replace(key, user_id=9), {"name": "Bob"})
                calls.start_soon(storage.clear, replace(key, user_id=10))
                await anyio.sleep(0.3)
    assert await storage.get_state(key) == "new"
    assert await storage.get_data(key) == {"name": "Ada", "age": 36}
    assert await storage.get_data(replace(key, user_id=9)) == {"name": "Bob"}


@IN_EVERY_OUTAGE
async def test_a_call_that_may_not_try_again_raises_the_first_error(
    open_troubled: OpenTroubled, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage, outage = await open_troubled(retry_for=0)
    with outage(), pytest.raises((DBAPIError, OSError)) as raised:
        await storage.set_state(key, "new")
    assert is_transient(raised.value)
    assert warnings(caplog) == []
    assert await storage.get_state(key) == "old"


@IN_EVERY_OUTAGE
async def test_a_call_raises_the_last_error_when_its_time_is_over(
    open_troubled: OpenTroubled, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the driver's, as SQLAlchemy has it; what went before is one line in the log."""
    storage, outage = await open_troubled(retry_for=RETRY_FOR)
    with outage(), pytest.raises((DBAPIError, OSError)) as raised:
        await storage.update_data(key, {"secret": SECRET})
    assert is_transient(raised.value)
    [warning] = warnings(caplog)
    assert ROW in warning
    assert storage.table.name in warning
    assert SECRET not in caplog.text
    assert await storage.get_data(key) == {}


Call = Callable[[], Coroutine[Any, Any, object]]


async def cancelled_by_its_task(call: Call, moment: Awaitable[None]) -> None:
    task = asyncio.ensure_future(call())
    await moment
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancelled_by_a_scope(call: Call, moment: Awaitable[None]) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await moment
        tasks.cancel_scope.cancel()


@IN_EVERY_OUTAGE
@pytest.mark.parametrize("cancelled", [cancelled_by_its_task, cancelled_by_a_scope])
async def test_a_call_cancelled_between_attempts_makes_no_more(
    open_troubled: OpenTroubled,
    key: StorageKey,
    cancelled: Callable[..., Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage, outage = await open_troubled()
    with outage():
        await cancelled(
            partial(storage.set_state, key, "new"), until(lambda: len(warnings(caplog)) > 0)
        )
    await anyio.sleep(0.3)
    assert await storage.get_state(key) == "old"


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_an_error_that_lasts_is_raised_at_once(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend, retry_for=10 * HANG)
    await storage.run_sync(lambda session: storage.table.drop(session.connection()))
    with anyio.fail_after(HANG), pytest.raises(DBAPIError):
        await storage.update_data(key, {"secret": SECRET})
    assert warnings(caplog) == []


@pytest.mark.parametrize("backend", NETWORKS, ids=str)
async def test_the_log_has_neither_password_nor_data(
    backend: Backend,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = url_of(backend).set(host="127.0.0.1", port=free_port(), password=SECRET, query={})
    storage = SQLAlchemyStorage(backend.factory(backend.engine(url)))
    await cancelled_by_a_scope(
        partial(storage.set_state, key, SECRET), until(lambda: len(warnings(caplog)) > 0)
    )
    assert ROW in caplog.text
    assert SECRET not in caplog.text
