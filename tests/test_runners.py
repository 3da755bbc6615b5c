"""How calls reach the database: loops, threads, pools, limiters, and sessions of every making."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from aiogram.exceptions import DataNotDictLikeError
from aiogram.fsm.storage.base import StorageKey
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import checkpoint
from backends import BACKENDS, IS_MARIADB, MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import (
    PATIENCE,
    give_way,
    locked,
    sqlite_without_fsync,
    statements,
    until,
)
from conftest import Open, drop_table, engine_of, rows
from sqlalchemy import URL, Delete, Insert, Update, create_engine, event, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool, Pool, StaticPool
from units import outside

from hybrid_storage import FSMData, SQLAlchemyStorage

# Who finds no connection free fails at once, instead of waiting in the pool for one.
ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    """Do not wait for the disk: this is about other things."""
    with sqlite_without_fsync():
        yield


async def update_at_once(
    storage: SQLAlchemyStorage, key: StorageKey, count: int, prefix: str = "field"
) -> None:
    """Set many fields at once, each by a call of its own."""
    await asyncio.gather(*(storage.update_data(key, {f"{prefix} {n}": n}) for n in range(count)))


async def use_all(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    """Call every operation, and check what it does."""
    await storage.set_state(key, "waiting")
    await storage.set_data(key, {"name": "Ada"})
    assert await storage.update_data(key, {"age": 36}) == {"name": "Ada", "age": 36}
    assert await storage.get_state(key) == "waiting"
    assert await storage.get_data(key) == {"name": "Ada", "age": 36}
    assert await storage.get_value(key, "name") == "Ada"
    await storage.set_state(key, None)
    await storage.set_data(key, {})
    assert await rows(storage) == []
    assert await storage.update_data(key, {"age": 36}) == {"age": 36}
    await storage.clear(key)
    assert await rows(storage) == []


def make(backend: Backend, engine: Any, **options: Any) -> Any:
    """Return a plain session factory of a backend's kind, with options."""
    return (async_sessionmaker if backend.is_async else sessionmaker)(engine, **options)


async def opened(
    open_storage: Open, backend: Backend, **options: Any
) -> tuple[SQLAlchemyStorage, Any, Any]:
    """Open a storage; return its session factory and its engine as well."""
    made: list[Any] = []

    def wrap(engine: Any) -> Any:
        made.extend([backend.factory(engine), engine])
        return made[0]

    storage = await open_storage(replace(backend, wrap=wrap), **options)
    return storage, made[0], made[1]


def sync_side(engine: Any) -> Any:
    """Return the engine that an engine is or has."""
    return getattr(engine, "sync_engine", engine)


async def dispose(*engines: Any) -> None:
    """Dispose engines of either kind."""
    for engine in engines:
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
        else:
            engine.dispose()


@contextmanager
def connections(engine: Any) -> Iterator[list[object]]:
    """Collect the connections that an engine makes, those beyond its pool included."""
    made: list[object] = []

    def note(connection: object, _: object) -> None:
        made.append(connection)

    event.listen(Pool, "connect", note)
    try:
        yield made
    finally:
        event.remove(Pool, "connect", note)


def begin_for_real(engine: Any) -> None:
    """Make SQLite's transactions hold savepoints, as SQLAlchemy's documents say."""

    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    engine = sync_side(engine)
    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))


# Loops and threads


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_one_storage_serves_several_event_loops_one_after_the_other(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    options: dict[str, Any] = {"poolclass": NullPool} if backend.is_async else {}
    engine = backend.engine(url_of(backend), **options)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")

    async def use(number: int) -> int:
        await update_at_once(storage, key, 5, f"loop {number}")
        return len(await storage.get_data(key))

    asyncio.run(storage.create_table())
    try:
        assert [asyncio.run(use(number)) for number in range(3)] == [5, 10, 15]
    finally:
        asyncio.run(drop_table(storage, engine))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_event_loops_that_have_ended_are_forgotten(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    """A Celery task may run a loop of its own each time."""
    options: dict[str, Any] = {"poolclass": NullPool} if backend.is_async else {}
    engine = backend.engine(url_of(backend), **options)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    isolation = storage.create_isolation()
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def use() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async with isolation.lock(key):
            await update_at_once(storage, key, 5)
        async with storage.transaction():
            await storage.set_state(key, "waiting")

    asyncio.run(storage.create_table())
    try:
        for _ in range(3):
            asyncio.run(use())
        deadline = time.monotonic() + PATIENCE
        while any(loop() for loop in loops) and time.monotonic() < deadline:
            time.sleep(0.01)  # the last worker is on its way out
            gc.collect()
        assert [loop() for loop in loops] == [None] * 3
    finally:
        asyncio.run(drop_table(storage, engine))


async def use_in_threads(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    """Set 100 fields from four event loops, each in a thread of its own, at once."""
    together = threading.Barrier(4)

    def use(number: int) -> None:
        together.wait()
        asyncio.run(update_at_once(storage, key, 25, f"thread {number}"))

    await asyncio.gather(*(asyncio.to_thread(use, number) for number in range(4)))
    assert len(await storage.get_data(key)) == 100


@pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if not backend.is_async], ids=str
)
async def test_one_storage_serves_several_threads_with_loops_of_their_own_at_once(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    options: dict[str, Any] = {}
    if backend.server == "sqlite":
        options["connect_args"] = {"timeout": PATIENCE}  # each loop is a writer of its own
    await use_in_threads(await open_storage(backend, engine_options=options), key)


async def test_sqlite_is_written_to_before_it_is_read_in_one_transaction(
    url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    # Else it fails at once where another has written meanwhile, whatever the time-out.
    engine: Any = SQLITE[0].engine(url_of(SQLITE[0]), connect_args={"timeout": PATIENCE})
    begin_for_real(engine)
    storage = SQLAlchemyStorage(sessionmaker(engine), retry_for=0)
    await storage.create_table()
    await use_in_threads(storage, key)
    await drop_table(storage, engine)


async def test_one_connection_for_all_threads_is_used_by_one_at_a_time(key: StorageKey) -> None:
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    storage = SQLAlchemyStorage(sessionmaker(engine))
    await storage.create_table()
    await use_in_threads(storage, key)
    engine.dispose()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_no_write_to_a_database_in_memory_is_lost(is_async: bool, key: StorageKey) -> None:
    engine: Any
    storage: SQLAlchemyStorage
    if is_async:
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        storage = SQLAlchemyStorage(async_sessionmaker(engine))
    else:
        engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        storage = SQLAlchemyStorage(sessionmaker(engine))
    await storage.create_table()
    await update_at_once(storage, key, 100)
    assert len(await storage.get_data(key)) == 100
    keys = [replace(key, chat_id=number) for number in range(100)]
    await asyncio.gather(*(storage.set_state(each, "waiting") for each in keys))
    assert len(await rows(storage)) == 101
    await drop_table(storage, engine)


async def test_the_event_loop_goes_on_while_a_statement_takes_its_time(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    storage: SQLAlchemyStorage = await open_storage(backend, retry_for=0)
    await storage.set_state(key, "waiting")
    ticks = 0
    done = anyio.Event()

    async def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            await checkpoint()
            ticks += 1

    async def write() -> None:
        await storage.set_state(key, "written")
        done.set()

    async with anyio.create_task_group() as tasks:
        with locked(backend, url_of(backend), storage, key) as lock:
            tasks.start_soon(tick)
            tasks.start_soon(write)
            await lock.is_waited_for()
            before = ticks
            await until(lambda: ticks > before + 100)
            assert not done.is_set()
            lock.release()
    assert await storage.get_state(key) == "written"


@pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if backend.server == "sqlite"], ids=str
)
async def test_writers_queue_before_sqlite_and_readers_do_not(
    backend: Backend, storage: SQLAlchemyStorage, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    await storage.set_state(key, "waiting")
    keys = [replace(key, chat_id=number) for number in range(5)]
    async with anyio.create_task_group() as tasks:
        with (
            locked(backend, url_of(backend), storage, key) as lock,
            statements(storage.table.name) as begun,
        ):
            for each in keys:
                tasks.start_soon(storage.set_state, each, "written")
            await lock.is_waited_for()
            await give_way()
            assert len(begun) == 1
            assert await storage.get_state(key) == "waiting"
            lock.release()
    assert len(await rows(storage)) == 6


# Pools


async def test_no_call_waits_in_a_pool_of_one_connection(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage, _, engine = await opened(open_storage, backend, engine_options=ONE_CONNECTION)
    with connections(engine) as made:
        await asyncio.gather(
            update_at_once(storage, key, 25),
            *(storage.get_data(key) for _ in range(25)),
            *(storage.clear(replace(key, chat_id=number)) for number in range(25)),
        )
    assert made == []
    assert len(await storage.get_data(key)) == 25


async def test_no_call_waits_in_a_default_pool(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage, _, _ = await opened(open_storage, backend, engine_options={"pool_timeout": 0.01})
    keys = [replace(key, chat_id=number) for number in range(50)]
    await asyncio.gather(*(storage.set_state(each, "waiting") for each in keys))
    assert len(await rows(storage)) == 50
    await asyncio.gather(*(storage.clear(each) for each in keys))
    assert await rows(storage) == []


async def test_two_storages_on_one_engine_share_its_pool(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    first, _, engine = await opened(open_storage, backend, engine_options=ONE_CONNECTION)
    second = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    await second.create_table()
    with connections(engine) as made:
        await asyncio.gather(update_at_once(first, key, 25), update_at_once(second, key, 25))
    assert made == []
    assert len(await first.get_data(key)) == len(await second.get_data(key)) == 25
    await second.run_sync(lambda session: second.table.drop(session.connection()))


async def test_a_pool_that_keeps_no_connections_serves_many_calls_at_once(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"poolclass": NullPool})
    await update_at_once(storage, key, 50)
    assert len(await storage.get_data(key)) == 50


# Limiters


async def test_a_limiter_of_the_callers_is_honoured_and_shared(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    limiter = CapacityLimiter(1)
    first = await open_storage(backend, limiter=limiter)
    second = await open_storage(backend, limiter=limiter)
    await first.set_state(key, "waiting")
    async with anyio.create_task_group() as tasks:
        with (
            locked(backend, url_of(backend), first, key) as lock,
            statements(second.table.name) as seen,
        ):
            tasks.start_soon(first.set_state, key, "first")
            await lock.is_waited_for()
            tasks.start_soon(second.set_state, key, "second")
            await until(lambda: limiter.statistics().tasks_waiting == 1)
            await give_way()
            assert seen == []
            lock.release()
    assert await first.get_state(key) == "first"
    assert await second.get_state(key) == "second"
    assert limiter.borrowed_tokens == 0


async def test_a_task_may_hold_the_limiter_that_its_calls_go_by(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    limiter = CapacityLimiter(2)
    storage = await open_storage(backend, limiter=limiter)
    async with limiter:
        await use_all(storage, key)
        assert limiter.borrowed_tokens == 1


@contextmanager
def applications_threads_all_taken() -> Iterator[None]:
    """Leave nothing of anyio's default limiter, as busy code of the application would."""
    limiter = to_thread.current_default_thread_limiter()
    total, application = limiter.total_tokens, object()
    limiter.total_tokens = 1
    limiter.acquire_on_behalf_of_nowait(application)
    try:
        yield
    finally:
        limiter.release_on_behalf_of(application)
        limiter.total_tokens = total


async def test_the_threads_of_the_application_are_not_waited_for(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    with applications_threads_all_taken(), anyio.fail_after(PATIENCE):
        await use_all(storage, key)


@pytest.mark.parametrize("driver", ["pysqlite", "aiosqlite"])
async def test_closing_does_not_wait_for_the_threads_of_the_application(
    driver: str, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    url = url_of(SQLITE[0]).set(drivername=f"sqlite+{driver}")
    storage = SQLAlchemyStorage.from_url(url)
    with applications_threads_all_taken(), anyio.fail_after(10):
        await storage.create_table()
        await storage.close()


# Sessions of every making


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_sessions_that_do_not_begin_by_themselves_are_begun(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(
        replace(backend, wrap=lambda engine: make(backend, engine, autobegin=False))
    )
    await use_all(storage, key)


@pytest.mark.parametrize("where", ["session class", "every session", "engine"])
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_what_is_set_when_a_transaction_begins_is_there_for_every_write(
    backend: Backend,
    where: str,
    open_storage: Open,
    key: StorageKey,
    request: pytest.FixtureRequest,
) -> None:
    class AppSession(Session):
        pass

    class Base(DeclarativeBase):
        pass

    class Conversation(FSMData, Base):
        __tablename__ = f"fsm_{uuid.uuid4().hex}"
        tenant: Mapped[str] = mapped_column(server_default=text("current_setting('app.tenant')"))

    def set_tenant(*args: Any) -> None:
        # The last argument of either event is the connection.
        args[-1].exec_driver_sql("SET LOCAL app.tenant = 'acme'")

    classes = {"sync_session_class" if backend.is_async else "class_": AppSession}
    storage, _, engine = await opened(
        open_storage,
        replace(backend, wrap=lambda engine: make(backend, engine, **classes)),
        table_name=Conversation,
    )
    target: Any = {
        "session class": AppSession,
        "every session": Session,
        "engine": sync_side(engine),
    }[where]
    name = "begin" if where == "engine" else "after_begin"
    event.listen(target, name, set_tenant)
    request.addfinalizer(lambda: event.remove(target, name, set_tenant))

    await storage.set_state(key, "waiting")
    await storage.update_data(replace(key, chat_id=1), {"name": "Ada"})
    tenant = list(storage.table.columns.keys()).index("tenant")
    assert [row[tenant] for row in await rows(storage)] == ["acme", "acme"]


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_no_update_is_lost_on_an_engine_in_autocommit_mode(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"isolation_level": "AUTOCOMMIT"})
    await update_at_once(storage, key, 50)
    assert len(await storage.get_data(key)) == 50


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("backend", [*POSTGRESQL, *MARIADB], ids=str)
async def test_no_update_is_lost_on_an_engine_of_a_stricter_isolation_level(
    backend: Backend, isolation_level: str, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, engine_options={"isolation_level": isolation_level})
    await storage.set_state(key, "waiting")
    await update_at_once(storage, key, 20)
    assert len(await storage.get_data(key)) == 20


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_everything_in_a_test_suites_transaction_is_rolled_back_with_it(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    engine: Any = backend.engine(url_of(backend))
    if backend.server == "sqlite":
        begin_for_real(engine)
    table_name = f"fsm_{uuid.uuid4().hex}"
    outside = SQLAlchemyStorage(backend.factory(engine), table_name=table_name)
    await outside.create_table()

    connection: Any = await engine.connect() if backend.is_async else engine.connect()
    transaction: Any = await connection.begin() if backend.is_async else connection.begin()
    inside = SQLAlchemyStorage(
        make(backend, connection, join_transaction_mode="create_savepoint"), table_name=table_name
    )
    await use_all(inside, key)
    await inside.set_state(key, "waiting")
    await update_at_once(inside, key, 20)
    assert len(await inside.get_data(key)) == 20
    for finish in (transaction.rollback, connection.close):
        await finish() if backend.is_async else finish()

    assert await rows(outside) == []
    await drop_table(outside, engine)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_a_session_that_chooses_the_engine_by_the_mapper_is_followed(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    url = url_of(backend)
    engine: Any = backend.engine(url)
    elsewhere: Any = backend.engine(url.set(database=f"{url.database}.elsewhere"))

    class RoutingSession(Session):
        # As in SQLAlchemy's documents, "Custom Vertical Partitioning".
        def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
            chosen = elsewhere
            if mapper and issubclass(mapper.class_, FSMData):
                chosen = engine
            return sync_side(chosen)

    classes = {"sync_session_class" if backend.is_async else "class_": RoutingSession}
    storage = SQLAlchemyStorage(make(backend, None, **classes))
    with statements() as seen:
        await storage.create_table()
        await use_all(storage, key)
        assert await storage.run_sync(lambda session: session.scalar(text("select 5"))) == 5
    assert {str(used.url.database) for used, _ in seen[:-1]} == {url.database}
    assert seen[-1] == (sync_side(elsewhere), "select 5")
    await drop_table(storage, engine)
    await dispose(elsewhere)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_an_update_reads_where_it_writes_if_the_session_reads_from_a_follower(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    url = url_of(backend)
    leader: Any = backend.engine(url)
    follower: Any = backend.engine(url.set(database=f"{url.database}.follower"))
    on_leader, on_follower = (
        SQLAlchemyStorage(backend.factory(engine)) for engine in (leader, follower)
    )
    await on_leader.create_table()
    await on_follower.create_table()  # it lags so far behind that it has no rows at all

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Any:
            writes = self._flushing or isinstance(clause, (Insert, Update, Delete))
            return sync_side(leader if writes else follower)

    classes = {"sync_session_class" if backend.is_async else "class_": RoutingSession}
    storage = SQLAlchemyStorage(make(backend, None, **classes))
    await storage.set_state(key, "waiting")
    assert await storage.get_state(key) is None
    assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
    assert await storage.update_data(key, {"age": 36}) == {"name": "Ada", "age": 36}
    await storage.set_state(key, None)
    assert await on_leader.get_data(key) == {"name": "Ada", "age": 36}
    await storage.set_data(key, {})
    assert await rows(on_leader) == await rows(on_follower) == []
    await dispose(leader, follower)


# The caller's own session


class Caller:
    """Calls the storage's operations in a session of its own, of either kind."""

    def __init__(self, storage: SQLAlchemyStorage, factory: Any) -> None:
        self._operations = storage.operations
        self.session: Any = factory()
        self.sync_session: Session = getattr(self.session, "sync_session", self.session)
        self._is_async = self.session is not self.sync_session

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with the session."""
        if self._is_async:
            return await self.session.run_sync(function, *args)
        return function(self.session, *args)

    async def call(self, operation: str, *args: Any) -> Any:
        """Call an operation of the storage."""
        return await self.run(getattr(self._operations, operation), *args)

    async def call_all(self, key: StorageKey) -> None:
        """Call every operation, those included that fail."""
        await self.call("set_state", key, "waiting")
        await self.call("set_data", key, {"name": "Ada"})
        assert await self.call("update_data", key, {"age": 36}) == {"name": "Ada", "age": 36}
        assert await self.call("get_state", key) == "waiting"
        assert await self.call("get_data", key) == {"name": "Ada", "age": 36}
        assert await self.call("get_value", key, "name") == "Ada"
        with pytest.raises(TypeError):
            await self.call("set_state", key, 5)
        with pytest.raises(DataNotDictLikeError):
            await self.call("set_data", key, [5])
        await self.call("set_state", key, None)
        await self.call("set_data", key, {})
        await self.call("clear", key)
        assert await self.call("update_data", key, {"age": 36}) == {"age": 36}

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.run(lambda session: session.close())


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_callers_session_is_neither_committed_nor_rolled_back(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage, factory, _ = await opened(open_storage, backend)
    ends: list[str] = []
    async with Caller(storage, factory) as caller:
        for name in ("after_commit", "after_rollback", "after_soft_rollback", "after_flush"):
            event.listen(caller.sync_session, name, lambda *_, name=name: ends.append(name))
        await caller.call("get_state", key)
        transaction = caller.sync_session.get_transaction()
        await caller.call_all(key)
        assert caller.sync_session.get_transaction() is transaction
        assert ends == []


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_others_see_the_writes_of_a_callers_session_once_it_commits(
    backend: Backend, end: str, open_storage: Open, key: StorageKey
) -> None:
    storage, factory, _ = await opened(open_storage, backend)
    async with Caller(storage, factory) as caller:
        await caller.call_all(key)
        assert await caller.call("get_data", key) == {"age": 36}
        assert await storage.get_data(key) == {}
        await caller.run(lambda session: getattr(session, end)())
        assert await storage.get_data(key) == ({"age": 36} if end == "commit" else {})


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_pending_objects_of_a_callers_session_are_left_pending(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage, factory, _ = await opened(open_storage, backend)
    async with Caller(storage, factory) as caller:
        pending = storage.model()
        pending.id = "of the application"
        caller.sync_session.add(pending)
        await caller.call_all(key)
        assert pending in caller.sync_session.new
        # The application's own queries flush it, as ever.
        assert caller.sync_session.autoflush
        assert await caller.run(lambda session: session.query(storage.model).count()) == 2


SNAPSHOT_ISOLATION = "SET SESSION innodb_snapshot_isolation = {}"


@pytest.mark.parametrize("backend", MARIADB, ids=str)
async def test_an_update_in_a_callers_older_snapshot_loses_nothing_of_the_newer_data(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    options: dict[str, Any] = {"isolation_level": "REPEATABLE READ"}
    if IS_MARIADB:
        options["connect_args"] = {"init_command": SNAPSHOT_ISOLATION.format("OFF")}
    storage, factory, _ = await opened(open_storage, backend, engine_options=options)
    await storage.set_data(key, {"old": 1})
    async with Caller(storage, factory) as caller:
        assert await caller.call("get_data", key) == {"old": 1}
        await storage.update_data(key, {"newer": 2})
        assert await caller.call("get_data", key) == {"old": 1}  # a snapshot it is
        together = {"old": 1, "newer": 2, "caller": 3}
        assert await caller.call("update_data", key, {"caller": 3}) == together
        await caller.run(lambda session: session.commit())
    assert await storage.get_data(key) == together


@pytest.mark.parametrize("backend", [*POSTGRESQL, *(MARIADB if IS_MARIADB else [])], ids=str)
async def test_an_update_in_a_callers_older_snapshot_fails_where_the_database_says_so(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    options: dict[str, Any] = {"isolation_level": "REPEATABLE READ"}
    if backend.server == "mariadb":
        options["connect_args"] = {"init_command": SNAPSHOT_ISOLATION.format("ON")}
    storage, factory, _ = await opened(open_storage, backend, engine_options=options)
    await storage.set_data(key, {"old": 1})
    async with Caller(storage, factory) as caller:
        assert await caller.call("get_data", key) == {"old": 1}
        await storage.update_data(key, {"newer": 2})
        with pytest.raises(DBAPIError, match=r"could not serialize|1020, .Record has"):
            await caller.call("update_data", key, {"caller": 3})
    assert await storage.get_data(key) == {"old": 1, "newer": 2}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("backend", MARIADB if IS_MARIADB else [], ids=str)
async def test_a_transaction_that_the_server_has_rolled_back_says_why_and_commits_nothing(
    backend: Backend, open_storage: Open, key: StorageKey, depth: int
) -> None:
    options = {"connect_args": {"init_command": SNAPSHOT_ISOLATION.format("ON")}}
    storage = await open_storage(backend, engine_options=options)
    overtaken = pytest.raises(DBAPIError, match=r"1020, .Record has changed")

    async def fail() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(depth):
                await stack.enter_async_context(storage.transaction())
            await storage.set_state(key, "overtaken")

    async def transact(*, goes_on: bool) -> None:
        async with storage.transaction():
            await storage.set_state(replace(key, user_id=8), "before")
            assert await storage.get_state(key) is None  # a snapshot
            await outside(storage.set_data(key, {"newer": goes_on}))
            if goes_on:
                with overtaken:
                    await fail()
                # By then, MariaDB has begun another transaction.
                await storage.set_state(replace(key, user_id=9), "after")
            else:
                await fail()

    await storage.set_data(key, {"old": 1})
    with overtaken:  # the error by which a transaction is known to be worth another attempt
        await transact(goes_on=False)
    if depth:
        with pytest.raises(PendingRollbackError, match="run all of it again"):
            await transact(goes_on=True)
    else:
        with pytest.raises(DBAPIError, match="error 1020, rolls it back: run it again"):
            await transact(goes_on=True)
    for user in (8, 9):
        assert await storage.get_state(replace(key, user_id=user)) is None


LEVELS = [
    *((each, {"isolation_level": "REPEATABLE READ"}) for each in POSTGRESQL),
    *((each, {"isolation_level": "SERIALIZABLE"}) for each in POSTGRESQL),
    *(
        (each, {"connect_args": {"init_command": SNAPSHOT_ISOLATION.format("ON")}})
        for each in (MARIADB if IS_MARIADB else [])
    ),
]


@pytest.mark.parametrize(("backend", "options"), LEVELS)
async def test_updates_that_overtake_each_other_are_made_again_at_once(
    backend: Backend, options: dict[str, Any], open_storage: Open, key: StorageKey
) -> None:
    """Where the isolation level has all but the first one fail, and nothing else tries again."""
    storage = await open_storage(backend, engine_options=options, retry_for=0)
    # For such an application, PostgreSQL gets no AUTOCOMMIT, where nothing is overtaken.
    event.listen(engine_of(storage), "begin", lambda connection: None)
    fields = [f"field {number}" for number in range(40)]
    await asyncio.gather(*(storage.update_data(key, {field: 1}) for field in fields))
    assert await storage.get_data(key) == dict.fromkeys(fields, 1)
