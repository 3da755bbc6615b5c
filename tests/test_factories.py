"""Which session factories the storage takes, which it refuses, and whose engine is whose."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import uuid
from asyncio import current_task
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.memory import MemoryStorage
from backends import POSTGRESQL, SQLALCHEMY_2_0, SQLITE, Backend
from conftest import Open, dispose, rows
from sqlalchemy import URL, Engine, MetaData, Table, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, UnboundExecutionError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool, StaticPool

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage, declare_model

SYNC, ASYNC = SQLITE


class AppSession(Session):
    """A session class of an application."""


class AppAsyncSession(AsyncSession):
    """An async session class of an application."""


@contextmanager
def statement_threads(engine: Engine | AsyncEngine) -> Iterator[set[int]]:
    """Collect the threads that an engine's statements come from."""
    threads: set[int] = set()

    def note(*_: object) -> None:
        threads.add(threading.get_ident())

    target = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    event.listen(target, "before_cursor_execute", note)
    try:
        yield threads
    finally:
        event.remove(target, "before_cursor_execute", note)


# What is taken


FITTING: dict[str, tuple[Backend, Callable[[Any], Any]]] = {
    "sessionmaker": (SYNC, sessionmaker),
    "sessionmaker of a Session subclass": (SYNC, lambda e: sessionmaker(e, class_=AppSession)),
    "scoped_session": (SYNC, lambda e: scoped_session(sessionmaker(e))),
    "async_sessionmaker": (ASYNC, async_sessionmaker),
    "async_sessionmaker of an AsyncSession subclass": (
        ASYNC,
        lambda e: async_sessionmaker(e, class_=AppAsyncSession),
    ),
    "async_sessionmaker with a Session subclass within": (
        ASYNC,
        lambda e: async_sessionmaker(e, sync_session_class=AppSession),
    ),
    "sessionmaker of AsyncSession": (ASYNC, lambda e: sessionmaker(e, class_=AsyncSession)),
    "async_scoped_session": (
        ASYNC,
        lambda e: async_scoped_session(async_sessionmaker(e), scopefunc=current_task),
    ),
    "scoped_session of AsyncSession": (
        ASYNC,
        lambda e: scoped_session(sessionmaker(e, class_=AsyncSession)),
    ),
}


@pytest.mark.parametrize(("backend", "factory"), FITTING.values(), ids=FITTING)
async def test_sync_factories_are_used_in_threads_and_async_ones_in_the_loop(
    backend: Backend,
    factory: Callable[[Any], Any],
    url_of: Callable[[Backend], URL],
    key: StorageKey,
) -> None:
    engine = backend.engine(url_of(backend))
    storage = SQLAlchemyStorage(factory(engine))
    with statement_threads(engine) as threads:
        await storage.create_table()
        await storage.set_state(key, "waiting")
        assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
        assert await storage.get_state(key) == "waiting"
    here = threading.get_ident()
    assert threads == {here} if backend.is_async else here not in threads
    await dispose(engine)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_an_engine_may_come_later(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    factory: Any = async_sessionmaker() if backend.is_async else sessionmaker()
    storage = SQLAlchemyStorage(factory)
    with pytest.raises(UnboundExecutionError):
        await storage.get_state(key)
    engine = backend.engine(url_of(backend))
    factory.configure(bind=engine)
    await storage.create_table()
    await storage.set_state(key, "waiting")
    assert await storage.get_state(key) == "waiting"
    await dispose(engine)


@pytest.mark.parametrize("by", ["model", "base", "table"])
@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_binds_choose_the_engine(
    backend: Backend, by: str, url_of: Callable[[Backend], URL], key: StorageKey, tmp_path: Path
) -> None:
    class Base(DeclarativeBase):
        pass

    model = declare_model(Base, "conversation")
    bound_to: dict[str, Any] = {"model": model, "base": Base, "table": Base.metadata.tables}
    table = Base.metadata.tables["conversation"]
    engine = backend.engine(url_of(backend))
    binds = {table if by == "table" else bound_to[by]: engine}
    elsewhere = backend.engine(URL.create("sqlite", database=str(tmp_path / "elsewhere.db")))
    make: Any = async_sessionmaker if backend.is_async else sessionmaker
    storage = SQLAlchemyStorage(make(elsewhere, binds=binds), Base, "conversation")
    with statement_threads(elsewhere) as elsewhere_used:
        await storage.create_table()
        await storage.set_state(key, "waiting")
        assert await storage.update_data(key, {"name": "Ada"}) == {"name": "Ada"}
        assert await storage.get_state(key) == "waiting"
    assert not elsewhere_used
    await dispose(engine)
    await dispose(elsewhere)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_a_lock_is_taken_inside_using_where_binds_choose_the_engine(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    """The session has an engine for each model, and none besides."""

    class Base(DeclarativeBase):
        pass

    engine = backend.engine(url_of(backend))
    make: Any = async_sessionmaker if backend.is_async else sessionmaker
    factory = make(binds={Base: engine})
    storage = SQLAlchemyStorage(factory, Base, "conversation")
    isolation = storage.create_isolation(lease=None)
    await storage.create_table()
    session = factory()
    async with storage.using(session), isolation.lock(key):
        await storage.set_state(key, "waiting")
        if backend.is_async:
            await session.commit()
        else:
            session.commit()
    assert await storage.get_state(key) == "waiting"
    await dispose(engine)


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_an_applications_scoped_session_is_not_committed(
    backend: Backend, flushed: bool, open_storage: Open, key: StorageKey
) -> None:
    app_sessions: list[Any] = []

    def scoped(engine: Any) -> Any:
        # One scope for all, so that nothing but the storage's own care keeps the sessions apart.
        session = (
            async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: "the app")
            if backend.is_async
            else scoped_session(sessionmaker(engine), scopefunc=lambda: "the app")
        )
        app_sessions.append(session)
        return session

    async def in_app(method: str) -> None:
        result = getattr(app_sessions[0], method)()
        if backend.is_async:
            await result

    storage = await open_storage(replace(backend, wrap=scoped))
    pending = storage.model(id="of the application", state="uncommitted")
    app_sessions[0].add(pending)
    if flushed:
        await in_app("flush")

    await storage.set_state(key, "waiting")
    await storage.update_data(key, {"name": "Ada"})
    assert await storage.get_state(key) == "waiting"

    assert pending in app_sessions[0]
    await in_app("remove")
    assert [row[0] for row in await rows(storage)] == ["42:-1001234567890:7"]


# What is refused


def sync_engine() -> Any:
    return create_engine("sqlite://", poolclass=QueuePool)


def async_engine() -> Any:
    return create_async_engine("sqlite+aiosqlite://")


class NoSession:
    """Takes what a session takes, but is none."""

    def __init__(self, **_: object) -> None: ...


def unknown(thing: Any) -> Any:
    """Return it, its type kept from the type checkers: what is wrong here they would see."""
    return thing


def something() -> Session:
    return Session(sync_engine())


WRONG: dict[str, tuple[Callable[[], object], list[str]]] = {
    "sessionmaker of an AsyncEngine": (
        lambda: sessionmaker(async_engine()),
        ["a sessionmaker", "AsyncEngine (sqlite+aiosqlite)", "create_engine()", "an async_session"],
    ),
    "sessionmaker of an Engine with an async driver": (
        lambda: sessionmaker(create_engine("postgresql+asyncpg://")),
        ["a sessionmaker", "Engine (postgresql+asyncpg)", "synchronous driver", "async_session"],
    ),
    "scoped_session of an AsyncEngine": (
        lambda: scoped_session(sessionmaker(async_engine())),
        ["AsyncEngine (sqlite+aiosqlite)", "create_engine()", "async_sessionmaker"],
    ),
    "async_sessionmaker of an Engine": (
        lambda: async_sessionmaker(sync_engine()),
        ["an async_sessionmaker", "Engine (sqlite+pysqlite)", "create_async_engine()", "a session"],
    ),
    "sessionmaker of AsyncSession and an Engine": (
        lambda: sessionmaker(sync_engine(), class_=AsyncSession),
        ["Engine (sqlite+pysqlite)", "create_async_engine()", "pass a sessionmaker"],
    ),
    "Engine": (sync_engine, ["Engine (sqlite+pysqlite)", "pass sessionmaker(engine)"]),
    "AsyncEngine": (
        async_engine,
        ["AsyncEngine (sqlite+aiosqlite)", "pass async_sessionmaker(engine)"],
    ),
    "Session": (something, ["Session", "pass the factory"]),
    "Session subclass": (AppSession, ["AppSession", "pass the factory"]),
    "AsyncSession": (lambda: AsyncSession(async_engine()), ["AsyncSession", "pass the factory"]),
    "the class Session": (lambda: Session, ["the class Session", "pass the factory"]),
    "the class sessionmaker": (
        lambda: sessionmaker,
        ["the class sessionmaker", "pass a sessionmaker"],
    ),
    "function": (lambda: something, ["function", "pass a sessionmaker or an async_sessionmaker"]),
    "lambda": (lambda: lambda: something(), ["function", "pass a sessionmaker"]),
    "scoped_session of a function": (
        lambda: scoped_session(unknown(something)),
        ["scoped_session", "pass a sessionmaker"],
    ),
    "sessionmaker of a class that is no session": (
        lambda: sessionmaker(class_=NoSession),
        ["sessionmaker makes NoSession", "pass a sessionmaker"],
    ),
    "class": (lambda: NoSession, ["the class NoSession", "pass a sessionmaker"]),
    "str": (lambda: "sqlite:///fsm.db", ["a URL", "SQLAlchemyStorage.from_url()"]),
    "URL": (lambda: make_url("sqlite:///fsm.db"), ["a URL", "SQLAlchemyStorage.from_url()"]),
    "None": (lambda: None, ["needs a sessionmaker or an async_sessionmaker"]),
    "number": (lambda: 5, ["int", "pass a sessionmaker"]),
    "another storage": (MemoryStorage, ["MemoryStorage", "pass a sessionmaker"]),
}


@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_factory_is_refused_with_what_came_and_what_to_pass(
    wrong: Callable[[], Any], words: list[str]
) -> None:
    with pytest.raises(TypeError) as refused:
        SQLAlchemyStorage(wrong())
    message = str(refused.value)
    assert [word for word in words if word not in message] == [], message


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(TypeError, match="needs a sessionmaker or an async_sessionmaker"):
        SQLAlchemyStorage()


LATE: dict[str, tuple[Callable[[], Any], Callable[[], object], str]] = {
    "AsyncEngine": (sessionmaker, async_engine, "AsyncEngine .*async_sessionmaker"),
    "Engine with an async driver": (
        sessionmaker,
        lambda: create_engine("postgresql+asyncpg://"),
        "postgresql.asyncpg.*async_sessionmaker",
    ),
    "Engine": (async_sessionmaker, sync_engine, "AsyncEngine expected, got Engine"),
}


@pytest.mark.parametrize(("make", "engine", "message"), LATE.values(), ids=LATE)
@pytest.mark.parametrize("in_binds", [False, True], ids=["bind", "binds"])
async def test_a_wrong_engine_that_comes_later_is_refused_at_the_first_use(
    make: Callable[[], Any],
    engine: Callable[[], object],
    message: str,
    in_binds: bool,
    key: StorageKey,
) -> None:
    factory = make()
    storage = SQLAlchemyStorage(factory)
    if in_binds:
        factory.configure(binds={storage.model: engine()})
    else:
        factory.configure(bind=engine())
    with pytest.raises((TypeError, ArgumentError), match=message):
        await storage.get_state(key)


# SQLite in memory


def refusal(url: str = "sqlite://") -> str:
    with pytest.raises(ValueError, match="in memory") as refused:
        SQLAlchemyStorage(sessionmaker(create_engine(url)))
    return str(refused.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_that_each_thread_has_for_itself_is_refused(url: str) -> None:
    assert "poolclass=StaticPool" in refusal(url)


async def test_a_database_in_memory_that_comes_later_is_refused_at_the_first_use(
    key: StorageKey,
) -> None:
    factory = sessionmaker()
    storage = SQLAlchemyStorage(factory)
    factory.configure(bind=create_engine("sqlite://"))
    with pytest.raises(ValueError, match="in memory"):
        await storage.get_state(key)


def remedies() -> dict[str, Callable[[], Engine]]:
    """Make engines of what the refusal says, to the letter."""
    message = refusal()
    shared = re.search("'(sqlite:///file:[^']*)'", message)
    assert shared is not None, message
    assert "poolclass=StaticPool and connect_args={'check_same_thread': False}" in message
    return {
        "one connection": lambda: create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        ),
        "shared cache": lambda: create_engine(
            shared[1].replace("NAME", uuid.uuid4().hex), poolclass=QueuePool
        ),
    }


@pytest.mark.parametrize("remedy", ["one connection", "shared cache"])
async def test_what_the_refusal_recommends_works_in_every_thread(
    remedy: str, key: StorageKey
) -> None:
    engine = remedies()[remedy]()
    storage = SQLAlchemyStorage(sessionmaker(engine))
    await storage.create_table()

    async def write_and_read() -> None:
        await asyncio.gather(*(storage.update_data(key, {f"field {n}": n}) for n in range(30)))
        read = await asyncio.gather(*(storage.get_data(key) for _ in range(30)))
        assert [len(data) for data in read] == [30] * 30

    await write_and_read()
    # A loop of its own works in threads of its own, while those of this loop are still there.
    await asyncio.to_thread(asyncio.run, write_and_read())
    engine.dispose()


# The other parameters

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "table_name=None": ({"table_name": None}, "table_name"),
    "table_name=bytes": ({"table_name": b"fsm"}, "table_name"),
    "table_name=empty": ({"table_name": ""}, "table_name"),
    "table_name=Table": ({"table_name": Table("fsm", MetaData())}, "table_name"),
    "table_name=class": ({"table_name": NoSession}, "FSMData"),
    "metadata=str": ({"metadata": "fsm"}, "metadata"),
    "metadata=class": ({"metadata": NoSession}, "metadata"),
    "key_builder=class": ({"key_builder": FullKeyBuilder}, "key_builder"),
    "key_builder=function": ({"key_builder": str}, "key_builder"),
    "json_dumps=module": ({"json_dumps": json}, "json_dumps"),
    "json_dumps=None": ({"json_dumps": None}, "json_dumps"),
    "json_loads=module": ({"json_loads": json}, "json_loads"),
    "json_loads=None": ({"json_loads": None}, "json_loads"),
    "limiter=number": ({"limiter": 5}, "limiter"),
    "limiter=semaphore": ({"limiter": asyncio.Semaphore(5)}, "limiter"),
}


@pytest.mark.parametrize(("options", "name"), KINDS.values(), ids=KINDS)
def test_a_parameter_of_the_wrong_kind_is_refused_by_name(
    options: dict[str, Any], name: str
) -> None:
    with pytest.raises(TypeError, match=name):
        SQLAlchemyStorage(sessionmaker(), **options)


@pytest.mark.parametrize(
    ("old", "new"), [("session", "sessionmaker"), ("base", "metadata")], ids=["session", "base"]
)
def test_a_former_parameter_name_is_taken_with_a_warning(old: str, new: str) -> None:
    arguments: dict[str, Any] = {"sessionmaker": sessionmaker(), "metadata": MetaData()}
    arguments[old] = arguments.pop(new)
    with pytest.warns(DeprecationWarning, match=rf"{old}=.*\b{new}=") as warned:
        storage = SQLAlchemyStorage(**arguments)
    assert [warning.filename for warning in warned] == [__file__]
    assert storage.metadata is arguments.get("metadata", arguments.get("base"))


@pytest.mark.parametrize(
    ("old", "new"), [("session", "sessionmaker"), ("base", "metadata")], ids=["session", "base"]
)
def test_a_parameter_under_both_its_names_is_refused(old: str, new: str) -> None:
    arguments: dict[str, Any] = {"sessionmaker": sessionmaker(), "metadata": MetaData()}
    arguments[old] = arguments[new]
    with pytest.raises(TypeError, match=rf"{old}=.*\b{new}="):
        SQLAlchemyStorage(**arguments)


def test_a_storage_is_true_and_has_no_length() -> None:
    storage = SQLAlchemyStorage(sessionmaker())
    assert (storage or MemoryStorage()) is storage
    assert not hasattr(storage, "__len__")


SYNC_ONLY = """
import asyncio, sys
sys.modules["greenlet"] = None  # as if it were not installed
import hybrid_storage
from aiogram.fsm.storage.base import StorageKey
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

async def main():
    key = StorageKey(bot_id=1, chat_id=2, user_id=3)
    storages = [
        hybrid_storage.SQLAlchemyStorage(sessionmaker(create_engine(sys.argv[1]))),
        hybrid_storage.SQLAlchemyStorage.from_url(sys.argv[1]),
    ]
    for storage in storages:
        await storage.create_table()
        await storage.set_state(key, "waiting")
        await storage.update_data(key, {"name": "Ada"})
        print(await storage.get_state(key), await storage.get_data(key))
        await storage.close()

asyncio.run(main())
print("sqlalchemy.ext.asyncio" in sys.modules)
"""


def test_synchronous_use_needs_neither_greenlet_nor_sqlalchemys_asyncio(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SYNC_ONLY, f"sqlite:///{tmp_path / 'fsm.db'}"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["waiting {'name': 'Ada'}"] * 2 + ["False"]


# Engines of the storage's own, and those of others


class SyncPool(QueuePool):
    """A pool that can be looked at afterwards."""

    made: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made.append(self)


class AsyncPool(AsyncAdaptedQueuePool):
    """The same for async engines."""

    made: ClassVar[list[Any]] = SyncPool.made

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made.append(self)


@pytest.fixture
def pools() -> Iterator[list[Any]]:
    """Return the list of the pools that engines make from now on."""
    SyncPool.made.clear()
    yield SyncPool.made
    SyncPool.made.clear()


def url_by_driver(backend: Backend, url: URL) -> URL:
    # "psycopg" alone stands for its synchronous side.
    driver = "psycopg_async" if backend.name == "psycopg-async" else backend.driver
    return url.set(drivername=f"{url.get_backend_name()}+{driver}")


@pytest.mark.parametrize("backend", [*SQLITE, *POSTGRESQL], ids=str)
@pytest.mark.parametrize("as_text", [False, True], ids=["URL", "str"])
async def test_a_storage_made_of_a_url_passes_options_on_and_disposes_its_engine(
    backend: Backend,
    as_text: bool,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    pools: list[Any],
) -> None:
    url = url_by_driver(backend, url_of(backend))
    metadata = MetaData()
    storage = SQLAlchemyStorage.from_url(
        url.render_as_string(hide_password=False) if as_text else url,
        metadata=metadata,
        table_name=f"fsm_{uuid.uuid4().hex}",
        json_dumps=lambda data: json.dumps(data).encode(),
        poolclass=AsyncPool if backend.is_async else SyncPool,
        pool_size=3,
        max_overflow=0,
    )
    assert storage.metadata is metadata
    await storage.create_table()
    await asyncio.gather(*(storage.update_data(key, {f"field {n}": n}) for n in range(10)))
    assert [pool.size() for pool in pools] == [3]
    assert 1 <= pools[0].checkedin() <= 3

    await storage.close()
    await storage.close()
    assert [pool.checkedin() for pool in pools] == [0] * len(pools)

    assert len(await storage.get_data(key)) == 10  # it can be used afterwards
    assert pools[-1].checkedin() == 1
    await storage.run_sync(lambda session: storage.table.drop(session.connection()))
    await storage.close()
    assert [pool.checkedin() for pool in pools] == [0] * len(pools)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_an_engine_of_the_application_outlives_the_storage(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    engine = backend.engine(url_of(backend), pool_size=5)
    storage = SQLAlchemyStorage(backend.factory(engine))
    await storage.create_table()
    pool: Any = engine.pool
    assert pool.checkedin() == 1

    await storage.close()
    await storage.close()
    assert pool.checkedin() == 1
    assert pool is engine.pool

    await storage.set_state(key, "waiting")
    assert await storage.get_state(key) == "waiting"
    await dispose(engine)


async def test_a_storage_made_of_a_url_to_memory_works_with_the_async_driver(
    key: StorageKey,
) -> None:
    storage = SQLAlchemyStorage.from_url("sqlite+aiosqlite://")
    await storage.create_table()
    await asyncio.gather(*(storage.update_data(key, {f"field {n}": n}) for n in range(30)))
    assert len(await storage.get_data(key)) == 30
    await storage.close()


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_execution_options_of_sessions_are_obeyed(
    backend: Backend, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    engine: Any = backend.engine(url_of(backend))
    made = SQLAlchemyStorage(backend.factory(engine), table_name="fsm_of_a_tenant")
    await made.create_table()
    factory: Any = async_sessionmaker if backend.is_async else sessionmaker
    options = {"schema_translate_map": {"nowhere": None}}
    if SQLALCHEMY_2_0:  # its sessions have no options but their engine's
        sessions = factory(engine.execution_options(**options))
    else:
        sessions = factory(engine, execution_options=options)
    storage = SQLAlchemyStorage(sessions, MetaData(schema="nowhere"), table_name="fsm_of_a_tenant")
    await storage.set_state(key, "Form:name")
    assert await made.get_state(key) == "Form:name"
    await dispose(engine)
