"""The backends that every test of behaviour runs on: a driver, and a factory of either kind."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pymysql
import sqlalchemy
from redis import Redis, RedisError
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

MYSQL_URL = os.environ.get("HYBRID_STORAGE_MYSQL_URL", "mysql://root@127.0.0.1:3306/test")
REDIS_URL = os.environ.get("HYBRID_STORAGE_REDIS_URL", "redis://127.0.0.1:6379/0")
POSTGRES_URL = os.environ.get("HYBRID_STORAGE_POSTGRES_URL")

SIZES = {"pool_size", "max_overflow", "pool_timeout"}
"""The options of pools that have a size."""

SQLALCHEMY_2_0 = sqlalchemy.__version__.startswith("2.0.")
BROKEN_PING = SQLALCHEMY_2_0 and int(sqlalchemy.__version__.split(".")[2]) < 50
"""Whether asyncmy can't be asked for a sign of life, because of the ping() of PyMySQL 1.2."""

# Processes are forked from one that has imported what takes long, and has no threads.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        *["hybrid_storage", "sqlalchemy.ext.asyncio", "aiogram", "aiohttp.web", "redis.asyncio"],
        *["aiosqlite", "asyncmy", "asyncpg", "psycopg", "pymysql"],
    ]
)


@dataclass(frozen=True)
class Backend:
    """A driver of a database, and a kind of session factory."""

    name: str
    server: str
    """Which database: sqlite, postgresql or mariadb."""
    driver: str
    is_async: bool
    wrap: Callable[[Any], Any] | None = None
    """Makes the session factory of an engine, where it is not the usual one."""
    driver_statements: bool = False
    """Whether units of work run their statements on the driver itself."""

    def engine(self, url: URL, **options: Any) -> Engine | AsyncEngine:
        """Return a new engine for the server's URL, whose driver is replaced by this one."""
        create = create_async_engine if self.is_async else create_engine
        if SIZES & options.keys():
            # Before SQLAlchemy 2.0.38, an engine on aiosqlite had no pool, which refuses sizes.
            options.setdefault("poolclass", AsyncAdaptedQueuePool if self.is_async else QueuePool)
        return create(url.set(drivername=f"{url.get_backend_name()}+{self.driver}"), **options)

    @property
    def without_tls(self) -> dict[str, Any]:
        """What ``connect_args`` need for a test that cancels calls while they connect.

        Cancelled while it asks for TLS, asyncpg leaves an exception to asyncio's log.
        """
        return {"ssl": "disable"} if self.driver == "asyncpg" else {}

    def factory(self, engine: Engine | AsyncEngine) -> Any:
        """Return a session factory of this backend's kind."""
        if self.wrap is not None:
            return self.wrap(engine)
        if isinstance(engine, AsyncEngine):
            return async_sessionmaker(engine)
        return sessionmaker(engine)

    def __str__(self) -> str:
        return self.name


def _mysql_says(statement: str) -> str | None:
    """Return what the MariaDB or MySQL server answers, None if none does."""
    url = make_url(MYSQL_URL)
    try:
        connection = pymysql.connect(
            host=url.host or "127.0.0.1",
            port=url.port or 3306,
            user=url.username or "root",
            password=str(url.password or ""),
            database=url.database,
            connect_timeout=5,
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            [[answer]] = cursor.fetchall()
            return str(answer)
    except pymysql.err.OperationalError:
        return None


@cache
def mysql_version() -> str | None:
    """Return the version of the MariaDB or MySQL server, None if none answers."""
    return _mysql_says("SELECT VERSION()")


IS_MARIADB = "MariaDB" in (mysql_version() or "")
"""Whether that server is MariaDB: MySQL lacks some of its settings."""
HAS_SNAPSHOT_ISOLATION = _mysql_says("SELECT @@innodb_snapshot_isolation") == "1"
"""Whether a transaction fails if it writes what has changed since it began: MariaDB 11.6."""


@cache
def redis_version() -> str | None:
    """Return the version of the Redis server, None if none answers."""
    try:
        with Redis.from_url(REDIS_URL, socket_connect_timeout=5) as client:
            return str(client.info("server")["redis_version"])
    except RedisError:
        return None


SQLITE = [
    Backend("sqlite3", "sqlite", "pysqlite", is_async=False),
    Backend("aiosqlite", "sqlite", "aiosqlite", is_async=True),
]
POSTGRESQL = [
    Backend("psycopg", "postgresql", "psycopg", is_async=False),
    Backend("psycopg-async", "postgresql", "psycopg", is_async=True),
    Backend("asyncpg", "postgresql", "asyncpg", is_async=True),
]
BY_DRIVER = replace(POSTGRESQL[2], name="asyncpg-itself", driver_statements=True)
"""Not one of ``SERVERS``: to units of work alone it makes a difference."""
MARIADB = [
    Backend("pymysql", "mariadb", "pymysql", is_async=False),
    Backend("asyncmy", "mariadb", "asyncmy", is_async=True),
][: None if mysql_version() else 0]  # none where no server answers
FACTORIES = [
    Backend(
        "scoped", "sqlite", "pysqlite", False, lambda engine: scoped_session(sessionmaker(engine))
    ),
    Backend(
        "old-style",
        "sqlite",
        "aiosqlite",
        True,
        lambda engine: sessionmaker(engine, class_=AsyncSession, expire_on_commit=False),
    ),
]
SERVERS = [*SQLITE, *POSTGRESQL, *MARIADB]
"""One backend for each driver that has a server here."""
BACKENDS = [*SERVERS, *FACTORIES]
"""All backends."""
