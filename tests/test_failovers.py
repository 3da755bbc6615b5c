"""What real servers, poolers and proxies answer in a failover passes; a wrong setting does not."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import to_thread
from backends import POSTGRESQL, Backend
from blocking import until
from chaos.proxy import free_port
from chaos.servers import (
    GALERA,
    MARIADBD,
    PGBOUNCER,
    Server,
    galera_node_at,
    pgbouncer,
    postgres,
)
from conftest import Open
from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from hybrid_storage._engine.codes import TRANSIENT_IN_MYSQL, TRANSIENT_TEXTS_IN_MYSQL
from hybrid_storage._engine.errors import is_of_the_wrong_server, is_transient

OF_POSTGRESQL = [
    *POSTGRESQL,
    Backend("psycopg2", "postgresql", "psycopg2", is_async=False),
    Backend("pg8000", "postgresql", "pg8000", is_async=False),
]
OF_MYSQL = [
    Backend("pymysql", "mariadb", "pymysql", is_async=False),
    Backend("asyncmy", "mariadb", "asyncmy", is_async=True),
    Backend("mysqlconnector", "mariadb", "mysqlconnector", is_async=False),
]
HAPROXY = shutil.which("haproxy")
# Left out, rather than skipped, where a program is not installed.
POOLED = OF_POSTGRESQL if PGBOUNCER else []
PROXIED = [*OF_POSTGRESQL, *OF_MYSQL] if HAPROXY else []
CLUSTERED = OF_MYSQL if all(MARIADBD) and GALERA else []

with_every_driver = pytest.mark.parametrize("backend", OF_POSTGRESQL, ids=str)
with_pgbouncer = pytest.mark.parametrize("backend", POOLED, ids=str)
with_galera = pytest.mark.parametrize("backend", CLUSTERED, ids=str)


async def attempt(backend: Backend, url: URL, *statements: str, **arguments: Any) -> None:
    """Connect, and execute statements.

    :param arguments: those of the driver's ``connect()``
    """
    engine = backend.engine(url, poolclass=NullPool, connect_args=arguments)
    statements = statements or ("SELECT 1",)
    if isinstance(engine, AsyncEngine):
        async with engine.connect() as connection:
            for statement in statements:
                await connection.exec_driver_sql(statement)
    else:
        await to_thread.run_sync(execute, engine, statements)


def execute(engine: Engine, statements: tuple[str, ...]) -> None:
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


async def error_of(backend: Backend, url: URL, *statements: str, **arguments: Any) -> Exception:
    """Return what an attempt raises."""
    try:
        await attempt(backend, url, *statements, **arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


# PostgreSQL: a standby, and one that becomes the primary


@pytest.fixture(autouse=True)
def left_sockets() -> Iterator[None]:
    """Collect the sockets that drivers leave which are refused: Python 3.13 would warn later."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """Return the data of a PostgreSQL server that was shut down: a standby starts with these."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        server = postgres(folder)
        with server.running():
            run(server.url, "CREATE TABLE t (i INTEGER)", "CHECKPOINT")
        (folder / "standby.signal").touch()
        yield folder


@pytest.fixture
def standby(data: Path) -> Iterator[URL]:
    """Return the URL of a hot standby: it can be read."""
    (data / "standby.signal").touch()
    with postgres(data).running() as server:
        yield server.url


def run(url: URL, *statements: str) -> None:
    """Execute statements, each in a transaction of its own."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        execute(engine, statements)
    finally:
        engine.dispose()


@with_every_driver
async def test_a_write_to_a_standby_passes_when_it_is_promoted(
    backend: Backend, standby: URL
) -> None:
    error = await error_of(backend, standby, "INSERT INTO t VALUES (1)")
    assert is_transient(error), repr(error)
    run(standby, "SELECT pg_promote()")
    await attempt(backend, standby, "INSERT INTO t VALUES (1)")


@pytest.mark.parametrize(
    "backend", [each for each in OF_POSTGRESQL if each.name != "pg8000"], ids=str
)
async def test_that_no_host_is_the_primary_passes(backend: Backend, standby: URL) -> None:
    error = await error_of(backend, standby, target_session_attrs="read-write")
    assert is_transient(error), repr(error)


@with_every_driver
async def test_that_a_server_stops_passes(backend: Backend, data: Path) -> None:
    """It waits for its clients to leave, and lets nobody in."""
    (data / "standby.signal").touch()
    with postgres(data).running() as server, connected(server.url):
        pid = int((data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGTERM)
        await until(lambda: "stopping" in (data / "postmaster.pid").read_text())
        error = await error_of(backend, server.url)
        assert is_transient(error), repr(error)


@contextmanager
def connected(url: URL) -> Iterator[Connection]:
    """Hold a connection."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


# A connection that is left to a server that takes no writes


def demote(session: Session) -> None:
    """Have the server say of this connection what a standby says."""
    session.connection().exec_driver_sql("SET default_transaction_read_only = on")


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_a_pooled_connection_to_a_server_that_is_read_only_by_now_is_given_up(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    """The old primary of a failover may keep it, and then each attempt would get it again."""
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})
    await storage.run_sync(demote)
    await storage.set_state(key, "Form:name")
    assert await storage.get_state(key) == "Form:name"


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_a_connection_that_is_found_read_only_at_a_commit_is_given_up(
    backend: Backend, open_storage: Open
) -> None:
    """A session writes at its commit what it has collected."""
    storage = await open_storage(backend, engine_options={"pool_size": 1, "max_overflow": 0})

    def add(session: Session) -> None:
        session.add(storage.model(id="42:7:7"))

    await storage.run_sync(demote)
    with pytest.raises(DBAPIError):
        await storage.run_sync(add)
    await storage.run_sync(add)


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_an_application_may_say_read_only_and_go_on_at_a_savepoint(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    """The answer is that of an old primary; the transaction goes on all the same."""
    storage = await open_storage(backend)
    await storage.set_state(key, "Form:name")

    def begin(session: Session) -> Any:
        session.connection().exec_driver_sql("SET TRANSACTION READ ONLY")
        return session.begin_nested()

    async with storage.transaction():
        savepoint = await storage.run_sync(begin)
        with pytest.raises(DBAPIError):
            await storage.set_state(key, "Form:age")
        await storage.run_sync(lambda session: savepoint.rollback())
        assert await storage.get_state(key) == "Form:name"


@with_galera
async def test_that_a_server_is_read_only_is_told_from_other_options(
    backend: Backend, node: URL
) -> None:
    with connected(node.set(username="root")) as root:
        root.exec_driver_sql("GRANT FILE ON *.* TO guest")
        lasting = await error_of(backend, node, "SELECT 1 INTO OUTFILE '/no/such/folder/file'")
        root.exec_driver_sql("SET GLOBAL read_only = 1")
        try:
            passing = await error_of(backend, node, INSERT)
        finally:
            root.exec_driver_sql("SET GLOBAL read_only = 0")
    assert isinstance(lasting, DBAPIError)
    assert isinstance(passing, DBAPIError)
    assert (is_of_the_wrong_server(passing), is_of_the_wrong_server(lasting)) == (True, False)


# Poolers and proxies


@pytest.fixture(scope="module")
def behind() -> Iterator[Server]:
    """Return the PostgreSQL server behind the poolers and the proxies."""
    with TemporaryDirectory() as folder, postgres(Path(folder)).running() as server:
        yield server


@contextmanager
def pooled(behind: Server, **settings: object) -> Iterator[URL]:
    """Run a PgBouncer with settings of its own, and give its URL."""
    with TemporaryDirectory() as name:
        server = pgbouncer(Path(name), behind)
        ini = Path(name) / "pgbouncer.ini"
        lines = [line for line in ini.read_text().splitlines() if line.split()[0] not in settings]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        ini.write_text("\n".join([*lines, "admin_users = postgres", ""]))
        with server.running():
            yield server.url


def tell(pooler: URL, command: str) -> None:
    """Give a PgBouncer a command, which it takes in the simple protocol only."""
    with (
        psycopg.connect(
            host=pooler.host,
            port=pooler.port,
            user="postgres",
            dbname="pgbouncer",
            autocommit=True,
            cursor_factory=psycopg.ClientCursor,
        ) as connection,
        suppress(psycopg.Error),
    ):
        connection.execute(command.encode())


@with_pgbouncer
async def test_that_a_pooler_has_no_connection_passes(backend: Backend, behind: Server) -> None:
    with pooled(behind, default_pool_size=1, query_wait_timeout=1) as url, connected(url) as held:
        held.exec_driver_sql("BEGIN")  # keeps the one connection
        error = await error_of(backend, url)
        held.exec_driver_sql("ROLLBACK")
    assert is_transient(error), repr(error)


@with_pgbouncer
async def test_that_a_pooler_has_too_many_clients_passes(backend: Backend, behind: Server) -> None:
    with pooled(behind, max_client_conn=2) as url, connected(url), connected(url):
        error = await error_of(backend, url)
    assert is_transient(error), repr(error)
    assert "no more connections allowed" in str(error)


@with_pgbouncer
async def test_that_a_pooler_does_not_reach_its_server_passes(backend: Backend) -> None:
    settings = {"server_login_retry": 15, "query_wait_timeout": 2}
    with (
        TemporaryDirectory() as name,
        postgres(Path(name)).running() as server,
        pooled(server, **settings) as url,
    ):
        server.crash()
        for _ in range(2):  # the first waits for the server, the second is told at once
            error = await error_of(backend, url)
            assert is_transient(error), repr(error)


@with_pgbouncer
@pytest.mark.parametrize("command", ["DISABLE postgres", "KILL postgres", "SHUTDOWN"])
async def test_that_a_pooler_is_told_to_stop_passes(
    backend: Backend, command: str, behind: Server
) -> None:
    with pooled(behind) as url:
        await attempt(backend, url)
        if command.startswith("DISABLE"):
            tell(url, command)
            error = await error_of(backend, url)
        else:
            timer = threading.Timer(0.3, tell, (url, command))
            timer.start()
            error = await error_of(backend, url, "SELECT pg_sleep(10)")
            await to_thread.run_sync(timer.join)
    assert is_transient(error), repr(error)


@pytest.mark.parametrize("backend", [each for each in POOLED if each.name != "pg8000"], ids=str)
async def test_a_setting_that_a_pooler_refuses_does_not_pass(
    backend: Backend, behind: Server
) -> None:
    arguments: dict[str, Any] = {"options": "-c jit=off"}
    if backend.driver == "asyncpg":
        arguments = {"server_settings": {"jit": "off"}}
    with pooled(behind) as url:
        error = await error_of(backend, url, **arguments)
    assert "unsupported startup parameter" in str(error)
    assert not is_transient(error), repr(error)


@with_pgbouncer
async def test_a_user_that_a_pooler_does_not_know_does_not_pass(
    backend: Backend, behind: Server
) -> None:
    with pooled(behind) as url:
        error = await error_of(backend, url.set(username="nobody_of_that_name"))
    assert not is_transient(error), repr(error)


# The others lose the answer when the pooler hangs up.
@pytest.mark.parametrize("backend", POOLED[: len(POSTGRESQL)], ids=str)
async def test_a_pooler_that_has_no_transactions_does_not_pass(
    backend: Backend, behind: Server
) -> None:
    with pooled(behind) as url:
        tell(url, "SET pool_mode = 'statement'")
        error = await error_of(backend, url, "BEGIN", "SELECT 1")
    assert "statement pooling mode" in str(error)
    assert not is_transient(error), repr(error)


def test_nor_does_it_in_the_words_of_an_older_psycopg() -> None:
    """psycopg 3.1, and 3.2 at first, had no SQLSTATE for what came before the hang-up."""
    said = "transaction blocks not allowed in statement pooling mode"
    hung_up = "server closed the connection unexpectedly"
    error = psycopg.OperationalError(f"consuming input failed: {said}\n{hung_up}")
    assert error.sqlstate is None
    assert not is_transient(DBAPIError("SELECT 1", {}, error, connection_invalidated=True))
    error = psycopg.OperationalError(f"consuming input failed: {hung_up}")
    assert is_transient(DBAPIError("SELECT 1", {}, error, connection_invalidated=True))


@with_pgbouncer
async def test_a_login_that_a_pooler_rejects_does_not_pass(
    backend: Backend, behind: Server
) -> None:
    with pooled(behind) as url:
        tell(url, "SET auth_type = 'hba'")  # without a rule that lets anybody in
        error = await error_of(backend, url)
    assert "login rejected" in str(error)
    assert not is_transient(error), repr(error)


@contextmanager
def proxied(check: str) -> Iterator[int]:
    """Run an HAProxy before a server that is not there, and give its port.

    :param check: how it finds that out
    """
    port = free_port()
    lines = [
        "defaults",
        *("mode tcp", "retries 0"),
        *("timeout connect 1s", "timeout client 10s", "timeout server 10s"),
        "listen database",
        *(f"bind 127.0.0.1:{port}", f"server one 127.0.0.1:{free_port()} {check}", ""),
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "haproxy.cfg"
        file.write_text("\n".join(lines))
        assert HAPROXY is not None
        silent = subprocess.DEVNULL
        process = subprocess.Popen([HAPROXY, "-db", "-f", file], stdout=silent, stderr=silent)
        try:
            yield port
        finally:
            process.kill()
            process.wait()


# MySQL Connector leaves its socket to the garbage collector when it is hung up on.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", PROXIED, ids=str)
@pytest.mark.parametrize(
    "check", ["", "check inter 50ms fall 1"], ids=["not reached", "marked down"]
)
async def test_that_the_server_behind_haproxy_is_gone_passes(backend: Backend, check: str) -> None:
    scheme = "postgresql" if backend.server == "postgresql" else "mysql"
    with proxied(check) as port:
        await until(lambda: answers(port))
        url = URL.create(scheme, "postgres", None, "127.0.0.1", port, "test")
        error = await error_of(backend, url)
    assert is_transient(error), repr(error)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# MariaDB, a node of a Galera cluster


@pytest.fixture(scope="module")
def node() -> Iterator[URL]:
    """Return the URL of a node, for a user without the rights of ``root``."""
    with TemporaryDirectory() as folder:
        options = {
            "secure-file-priv": folder,
            "max-user-connections": 100,  # or it could not be changed
        }
        with galera_node_at(Path(folder), **options).running() as server:
            url = server.url
            run(
                url,
                "CREATE TABLE t (i INTEGER PRIMARY KEY)",
                "CREATE USER guest",
                "GRANT ALL ON test.* TO guest",
            )
            yield url.set(username="guest")


INSERT = "INSERT INTO t VALUES (1)"
SETTINGS_OF_NODES = [
    ("read_only", 1, 0, 1290),
    ("max_connections", 10, 100, 1040),
    ("max_user_connections", 1, 100, 1203),
    ("wsrep_reject_queries", "'ALL'", "'NONE'", 1047),
]


# MySQL Connector leaves the socket of a refused connection to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket", "ignore:Exception ignored.*<socket")
@with_galera
@pytest.mark.parametrize(("name", "value", "former", "number"), SETTINGS_OF_NODES)
async def test_that_a_node_takes_nothing_passes(
    backend: Backend, name: str, value: object, former: object, number: int, node: URL
) -> None:
    others = {"max_connections": 9, "max_user_connections": 1}.get(name, 0)
    with connected(node.set(username="root")) as root, ExitStack() as stack:
        root.exec_driver_sql(f"SET GLOBAL {name} = {value}")
        try:
            for _ in range(others):
                with suppress(OperationalError):  # those of the test before may not be gone yet
                    stack.enter_context(connected(node))
            error = await error_of(backend, node, INSERT)
        finally:
            root.exec_driver_sql(f"SET GLOBAL {name} = {former}")
    assert is_transient(error), repr(error)
    assert str(number) in str(error)
    assert number in TRANSIENT_IN_MYSQL or number in TRANSIENT_TEXTS_IN_MYSQL
    del error
    gc.collect()


@with_galera
async def test_an_option_that_prevents_a_statement_for_good_does_not_pass(
    backend: Backend, node: URL
) -> None:
    """The number is the one of a server that is read only."""
    with connected(node.set(username="root")) as root:
        root.exec_driver_sql("GRANT FILE ON *.* TO guest")
    error = await error_of(backend, node, "SELECT 1 INTO OUTFILE '/no/such/folder/file'")
    assert "1290" in str(error)
    assert not is_transient(error), repr(error)
