"""Each time-out that docs/guides/connection-strings.md prints strikes, and then what it says."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
import strings
from aiogram.fsm.storage.base import StorageKey
from backends import IS_MARIADB, MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import locked, until
from chaos.proxy import Proxy
from conftest import Open, StartProxy, all_at_once, drop_table
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from hybrid_storage import SQLAlchemyStorage

PATIENCE = 30.0  # seconds, for time-outs of two
BY_NETWORK = [*POSTGRESQL, *MARIADB]
WITH_ALL_SETTINGS = [*POSTGRESQL, *(MARIADB if IS_MARIADB else [])]


def is_retried(caplog: pytest.LogCaptureFixture, storage: SQLAlchemyStorage) -> bool:
    """Tell whether a storage has said that it tries again."""
    messages = [record.getMessage() for record in caplog.records]
    return any("trying again" in each and storage.table.name in each for each in messages)


async def behind(
    open_storage: Open, backend: Backend, proxy: Proxy, *what: str, **options: Any
) -> SQLAlchemyStorage:
    """Return a storage behind the proxy, with the time-outs that are printed for its driver."""
    arguments = {**strings.connect_args(backend, *what), "host": "127.0.0.1", "port": proxy.port}
    opened = await open_storage(backend, engine_options={"connect_args": arguments, **options})
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


# The network


async def test_a_host_that_is_gone_is_noticed_while_connecting(
    start_proxy: StartProxy,
    open_storage: Open,
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(backend: Backend) -> None:
        proxy = start_proxy(backend)
        storage = await behind(open_storage, backend, proxy, "connecting", poolclass=NullPool)
        with anyio.fail_after(PATIENCE):
            with proxy.gone():
                call = asyncio.create_task(storage.set_state(key, "kept"))
                await until(lambda: is_retried(caplog, storage))
            await call
        assert await storage.get_state(key) == "kept"

    await all_at_once(BY_NETWORK, check)


async def test_a_network_that_goes_silent_is_noticed(
    start_proxy: StartProxy,
    open_storage: Open,
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(backend: Backend) -> None:
        what = ["a silent network"]
        if backend.server == "postgresql":
            what.append("connecting")  # for the attempts that follow
        proxy = start_proxy(backend)
        storage = await behind(open_storage, backend, proxy, *what)
        await storage.set_state(key, "before")
        with anyio.fail_after(PATIENCE):
            with proxy.gone():
                call = asyncio.create_task(storage.set_state(key, "kept"))
                await until(lambda: is_retried(caplog, storage))
            await call
        assert await storage.get_state(key) == "kept"

    await all_at_once(BY_NETWORK, check)


async def test_all_but_psycopg_notice_a_server_that_stands_still(
    start_proxy: StartProxy,
    open_storage: Open,
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(backend: Backend) -> None:
        proxy = start_proxy(backend)
        storage = await behind(open_storage, backend, proxy, "connecting", "a silent network")
        await storage.set_state(key, "before")
        with anyio.fail_after(PATIENCE):
            with proxy.hanging():
                call = asyncio.create_task(storage.set_state(key, "kept"))
                if backend.driver == "psycopg":
                    await asyncio.sleep(5)  # twice as long as its time-outs
                    assert not is_retried(caplog, storage)
                else:
                    await until(lambda: is_retried(caplog, storage))
            await call
        assert await storage.get_state(key) == "kept"

    await all_at_once(BY_NETWORK, check)


@pytest.mark.parametrize("backends", [pytest.param(MARIADB, id="mariadb")] if MARIADB else [])
async def test_a_server_that_does_not_greet_is_noticed_by_read_timeout(
    backends: list[Backend],
    start_proxy: StartProxy,
    open_storage: Open,
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(backend: Backend) -> None:
        proxy = start_proxy(backend)
        storage = await behind(open_storage, backend, proxy, "a silent network", poolclass=NullPool)
        with anyio.fail_after(PATIENCE):
            with proxy.hanging():
                call = asyncio.create_task(storage.set_state(key, "kept"))
                await until(lambda: is_retried(caplog, storage))
            await call

    await all_at_once(backends, check)


# The server


def in_short(setting: str) -> str:
    """Return a setting with a time that a test can wait for."""
    return re.sub(r"'\d+s'", "'300ms'", re.sub(r"= \d+$", "= 1", setting))


@contextmanager
def role_with(setting: str, url: URL) -> Iterator[URL]:
    """Create a role of PostgreSQL's with a setting; drop it at the end, with all that it has made.

    :return: the URL to log in with it
    """
    role = f"r_{uuid.uuid4().hex}"
    engine: Any = POSTGRESQL[0].engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as admin:
        admin.exec_driver_sql(f"CREATE ROLE {role} LOGIN SUPERUSER")
        admin.exec_driver_sql(f"ALTER ROLE {role} SET {setting}")
        try:
            yield url.set(username=role)
        finally:
            admin.exec_driver_sql(f"DROP OWNED BY {role}")
            admin.exec_driver_sql(f"DROP ROLE {role}")


@asynccontextmanager
async def limited(backend: Backend, what: str, url: URL) -> AsyncIterator[SQLAlchemyStorage]:
    """Open a storage with one of the server's time-outs, made short."""
    with ExitStack() as stack:
        arguments: dict[str, Any] = {}
        role = url
        if backend.server == "postgresql":
            setting = in_short(strings.time_out(backend, what))
            role = stack.enter_context(role_with(setting, url))
        elif backend.server == "mariadb":
            setting = in_short(strings.time_out(backend, what))
            arguments = {"init_command": f"SET SESSION {setting}"}
        else:
            arguments = dict.fromkeys(strings.connect_args(backend, what), 0.3)
        engine = backend.engine(role, connect_args=arguments)
        storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
        await storage.create_table()
        try:
            yield storage
        finally:
            await drop_table(storage, engine)


@pytest.mark.parametrize("backend", WITH_ALL_SETTINGS, ids=str)
async def test_a_statement_that_takes_too_long_is_raised_at_once(
    backend: Backend,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = url_of(backend)
    async with limited(backend, "a statement", url) as storage:
        await storage.set_state(key, "before")
        with (
            anyio.fail_after(PATIENCE),
            locked(backend, url, storage, key),
            pytest.raises(DBAPIError, match=r"statement timeout|max_statement_time"),
        ):
            await storage.set_state(key, "after")
    assert not is_retried(caplog, storage)


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_lock_that_takes_too_long_is_retried(
    backend: Backend,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = url_of(backend)
    async with limited(backend, "a lock", url) as storage:
        await storage.set_state(key, "before")
        with anyio.fail_after(PATIENCE), locked(backend, url, storage, key) as lock:
            call = asyncio.create_task(storage.set_state(key, "after"))
            await until(lambda: is_retried(caplog, storage))
            lock.release()
            await call
        assert await storage.get_state(key) == "after"


async def test_an_idle_transaction_ends_and_its_next_call_raises(
    url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    async def check(backend: Backend) -> None:
        async with limited(backend, "idle in a transaction", url_of(backend)) as storage:
            with anyio.fail_after(PATIENCE), pytest.raises(DBAPIError):
                async with storage.transaction():
                    await storage.set_state(key, "lost")
                    await asyncio.sleep(2)
                    await storage.set_state(key, "lost as well")
            assert await storage.get_state(key) is None

    await all_at_once(WITH_ALL_SETTINGS, check)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
def test_sqlite_has_one_of_them(backend: Backend) -> None:
    assert [what for what in strings.TIME_OUTS if strings.time_out(backend, what)] == ["a lock"]


# Settings of the connection, in place of the role's


@pytest.mark.parametrize("backend", WITH_ALL_SETTINGS, ids=str)
async def test_the_settings_of_a_connection_are_those_of_the_server(
    backend: Backend, open_storage: Open
) -> None:
    beginning = {"psycopg": '"options"', "asyncpg": '"server_settings"'}
    arguments = strings.dictionary(beginning.get(backend.driver, '"init_command"'))
    storage = await open_storage(backend, engine_options={"connect_args": arguments})
    if backend.server == "postgresql":
        show, whats = "SHOW {}", ["a statement", "a lock"]
    else:
        show, whats = "SELECT round(@@SESSION.{})", strings.TIME_OUTS[2:]

    def shown(session: Session, name: str) -> str:
        return str(session.scalar(text(show.format(name)))).removesuffix(".0")

    for what in whats:
        name, value = strings.time_out(backend, what).split(" = ")
        assert await storage.run_sync(shown, name) == value.strip("'")


# A time-out in the caller's task, which drivers make by cancelling that task


async def test_a_drivers_time_out_is_not_taken_for_a_cancellation(
    start_proxy: StartProxy, open_storage: Open
) -> None:
    def one(session: Session) -> object:
        return session.scalar(text("SELECT 1"))

    async def check(backend: Backend) -> None:
        proxy = start_proxy(backend)
        storage = await behind(open_storage, backend, proxy, "connecting", "a silent network")
        with anyio.fail_after(PATIENCE):
            with proxy.gone():
                for _ in range(2):  # on the pooled connection, and while connecting
                    with pytest.raises((DBAPIError, OSError, asyncio.TimeoutError)):
                        await storage.run_sync(one)
            assert await storage.run_sync(one) == 1

    await all_at_once([POSTGRESQL[2], *MARIADB[1:]], check)
