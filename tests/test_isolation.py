"""Event isolation: one handler at a time for a key, whatever happens to those who want it.

A ``Side`` is what each of several processes would have, an engine of its own included: the database
cannot tell two of them from two processes. Tests with real processes are in
``test_isolation_processes.py``.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
)
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from threading import Event as ThreadEvent
from typing import Any, TypeAlias

import anyio
import pytest
from aiogram import Bot, Dispatcher
from aiogram.dispatcher.event.bases import CancelHandler, SkipHandler
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from aiogram.types import Chat, Message, Update, User
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from backends import MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import PATIENCE, give_way, statements, until
from conftest import Open, checked_out, dispose, engine_of
from isolation_worker import forego_the_disk
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import StaticPool

from hybrid_storage import (
    FullKeyBuilder,
    SessionMiddleware,
    SQLAlchemyEventIsolation,
    SQLAlchemyStorage,
)

one_backend_a_server = pytest.mark.parametrize(
    "backend", {backend.server: backend for backend in reversed(SERVERS)}.values(), ids=str
)
one_backend_of_each_kind = pytest.mark.parametrize(
    "backend",
    {(backend.server, backend.is_async): backend for backend in SERVERS}.values(),
    ids=str,
)
on_each_driver = pytest.mark.parametrize("backend", SERVERS, ids=str)


@dataclass
class Side:
    """A storage on an engine of its own, and its isolation."""

    storage: SQLAlchemyStorage
    isolation: SQLAlchemyEventIsolation
    owner: str = ""
    """By what name it holds locks."""
    wanted: Counter[StorageKey] = field(default_factory=Counter)
    """How many tasks hold a key or wait for it, by :meth:`lock`."""

    @property
    def table(self) -> Table:
        """The table of locks."""
        name = f"{self.storage.table.name}_lock"
        return self.storage.metadata.tables[name]

    @property
    def engine(self) -> Engine:
        """The engine, or the synchronous one inside of it."""
        return engine_of(self.storage)

    def row(self, key: StorageKey) -> str:
        """Return a key as the table has it."""
        return FullKeyBuilder().build(key)

    @asynccontextmanager
    async def lock(self, key: StorageKey) -> AsyncGenerator[None, None]:
        """Hold a lock, and count who does or wants to."""
        self.wanted[key] += 1
        try:
            async with self.isolation.lock(key):
                yield
        finally:
            self.wanted[key] -= 1

    async def learn_owner(self) -> None:
        """Take a lock that nobody else wants, and see who has it."""
        key = StorageKey(bot_id=1, chat_id=id(self), user_id=1)
        async with self.isolation.lock(key):
            self.owner = (await self.locks())[self.row(key)]

    async def locks(self) -> dict[str, str]:
        """Return the owners of all locks."""
        return {row: owner for row, (owner, _) in (await self.leases()).items()}

    async def leases(self) -> dict[str, tuple[str, float]]:
        """Return the owners of all locks that are held, and when these end."""

        def read(session: Session) -> dict[str, tuple[str, float]]:
            rows = session.execute(select(self.table).where(self.table.c.owner != ""))
            return {row.id: (row.owner, row.expires) for row in rows}

        found: dict[str, tuple[str, float]] = await self.storage.run_sync(read)
        return found

    async def execute(self, statement: str) -> None:
        """Execute a statement, in which TABLE stands for the table of locks."""
        statement = statement.replace("TABLE_OF_LOCKS", self.table.name)
        await self.storage.run_sync(lambda session: session.execute(text(statement)))

    async def end(self) -> None:
        """Check that nothing is held."""
        await self.isolation.close()
        assert await self.locks() == {}
        await until(lambda: checked_out(self.engine) == 0)  # a last renewal may be under way


Start: TypeAlias = Callable[..., Coroutine[Any, Any, Side]]


@pytest.fixture
async def start(open_storage: Open) -> AsyncIterator[Start]:
    """Return a function that makes sides, those of one backend on one table."""
    sides: dict[Backend, list[Side]] = {}
    name = f"fsm_{uuid.uuid4().hex}"

    async def start(
        backend: Backend, *, engine_options: dict[str, Any] | None = None, **options: Any
    ) -> Side:
        table = f"{name}_{backend.name.replace('-', '_')}"
        storage = await open_storage(backend, table_name=table, engine_options=engine_options)
        side = Side(storage, storage.create_isolation(**{"poll": 0.05, **options}))
        forego_the_disk(side.engine)
        await storage.create_table()
        await side.learn_owner()
        sides.setdefault(backend, []).append(side)
        return side

    try:
        yield start
        for side in itertools.chain(*sides.values()):
            await side.end()
    finally:
        for first, *_ in sides.values():
            await first.storage.run_sync(partial(drop, first.table))


def drop(table: Table, session: Session) -> None:
    """Drop a table that may be gone already."""
    table.drop(session.connection(), checkfirst=True)


@pytest.fixture
async def side(backend: Backend, start: Start) -> Side:
    """Return a side, on each backend."""
    return await start(backend)


@pytest.fixture
async def other(backend: Backend, start: Start, side: Side) -> Side:
    """Return a second side, on the same table."""
    return await start(backend)


@asynccontextmanager
async def held(side: Side, key: StorageKey) -> AsyncGenerator[None, None]:
    """Let another task hold a key meanwhile."""
    entered, leave = anyio.Event(), anyio.Event()

    async def hold() -> None:
        async with side.lock(key):
            entered.set()
            await leave.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        with anyio.fail_after(PATIENCE):
            await entered.wait()
        try:
            yield
        finally:
            leave.set()


async def enter(side: Side, key: StorageKey) -> None:
    """Take a lock, which must be free or become so, and free it."""
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                async with side.lock(key):
                    return
            except TimeoutError:  # it has a limit, and the machine is busy
                continue


def keys(number: int) -> list[StorageKey]:
    """Return the keys of as many users."""
    return [StorageKey(bot_id=42, chat_id=user, user_id=user) for user in range(number)]


# One at a time


async def test_no_two_tasks_are_inside_with_the_same_key_in_whichever_process(
    side: Side, other: Side, key: StorageKey
) -> None:
    inside, count = 0, 0

    async def count_up(isolation: SQLAlchemyEventIsolation) -> None:
        nonlocal inside, count
        for _ in range(3):
            async with isolation.lock(key):
                inside += 1
                assert inside == 1
                seen = count
                await anyio.sleep(0.002)
                count = seen + 1
                inside -= 1

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            for each in [side, other] * 4:
                group.start_soon(count_up, each.isolation)

    assert count == 2 * 4 * 3


async def test_the_tasks_of_a_process_get_in_by_the_order_in_which_they_asked(
    side: Side, key: StorageKey
) -> None:
    order = []

    async def ask(number: int) -> None:
        async with side.isolation.lock(key):
            order.append(number)
            await anyio.sleep(0.001)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(ask, number)

    assert order == list(range(10))


async def test_one_task_of_a_process_asks_the_database_and_the_others_queue_behind_it(
    backend: Backend, start: Start, other: Side, key: StorageKey
) -> None:
    side = await start(backend, poll=60)  # pauses grow, so that one task asks a few times only
    order = []

    async def ask(number: int) -> None:
        async with side.lock(key):
            order.append(number)

    async with anyio.create_task_group() as group:
        with statements("INSERT", side.table.name) as asked:
            async with held(other, key):
                asked.clear()
                for number in range(20):
                    group.start_soon(ask, number)
                await until(lambda: side.wanted[key] == 20)
                await anyio.sleep(0.2)
                assert 1 <= len(asked) < 20
                assert order == []

    assert order == list(range(20))


async def test_different_keys_do_not_wait_for_each_other(side: Side, other: Side) -> None:
    inside = 0

    async def hold(isolation: SQLAlchemyEventIsolation, key: StorageKey) -> None:
        nonlocal inside
        async with isolation.lock(key):
            inside += 1
            await until(lambda: inside == 6)

    async with anyio.create_task_group() as group:
        for each, key in zip([side, other] * 3, keys(6), strict=True):
            group.start_soon(hold, each.isolation, key)


async def test_keys_that_differ_by_destiny_alone_share_a_lock_and_nest(
    side: Side, other: Side, key: StorageKey
) -> None:
    inner = StorageKey(key.bot_id, key.chat_id, key.user_id, destiny="aiogd:stack:")
    row = side.row(key)

    for first, second in [(key, inner), (inner, key)]:
        async with side.isolation.lock(first):
            for _ in range(2):
                with statements(side.table.name) as asked:
                    async with side.isolation.lock(second):
                        assert side.isolation.still_held(first)
                        assert side.isolation.still_held(second)
                assert asked == []
            assert await other.locks() == {row: side.owner}
            with anyio.move_on_after(0.1) as limit:
                await enter(other, second)
            assert limit.cancelled_caught, "two were inside"
        await enter(other, second)


async def test_another_task_waits_for_another_destiny_of_a_conversation_that_is_held(
    side: Side, key: StorageKey
) -> None:
    async with held(side, key):
        with anyio.move_on_after(0.1) as limit:
            await enter(side, replace(key, destiny="aiogd:stack:"))
        assert limit.cancelled_caught, "two were inside"


async def test_a_task_that_asks_for_a_key_it_holds_is_refused_and_goes_on_holding_it(
    side: Side, key: StorageKey
) -> None:
    async with side.isolation.lock(key):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"holds the lock of .* already"):
                async with side.isolation.lock(key):
                    pytest.fail("the lock was taken twice")
        assert await side.locks() == {side.row(key): side.owner}
    await enter(side, key)


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[0]], ids=str)
async def test_threads_with_an_event_loop_each_may_share_an_isolation(
    side: Side, key: StorageKey
) -> None:
    freed = False

    async def get_in() -> None:
        async with side.isolation.lock(key):
            assert freed, "two were inside"

    async with anyio.create_task_group() as group, side.isolation.lock(key):
        group.start_soon(anyio.to_thread.run_sync, lambda: asyncio.run(get_in()))
        await anyio.sleep(0.2)
        freed = True


# What a handler does is its own affair


class Interruption(BaseException):
    """What asyncio's own base exceptions are like."""


@pytest.mark.parametrize(
    "error",
    [ValueError("wrong"), SkipHandler(), CancelHandler(), Interruption(), TimeoutError("its own")],
    ids=lambda error: type(error).__name__,
)
@one_backend_a_server
async def test_an_exception_of_the_handler_comes_out_as_it_is_and_frees_the_key(
    side: Side, key: StorageKey, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        async with side.isolation.lock(key):
            raise error

    assert caught.value is error
    assert error.__cause__ is error.__context__ is None
    assert await side.locks() == {}


Cancel: TypeAlias = Callable[
    [Callable[[], Coroutine[Any, Any, None]], Callable[[], Awaitable[None]]], Awaitable[None]
]


def by_cancelling_the_task(times: int) -> Cancel:
    """Cancel as asyncio does, once or over and over."""

    async def cancel(
        work: Callable[[], Coroutine[Any, Any, None]], ready: Callable[[], Awaitable[None]]
    ) -> None:
        task = asyncio.ensure_future(work())
        await ready()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    return cancel


async def by_a_scope(
    work: Callable[[], Coroutine[Any, Any, None]], ready: Callable[[], Awaitable[None]]
) -> None:
    """Cancel as anyio does."""
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await ready()
        group.cancel_scope.cancel()


async def by_wait_for(
    work: Callable[[], Coroutine[Any, Any, None]], ready: Callable[[], Awaitable[None]]
) -> None:
    """Cancel by a time-out: wherever that hits."""
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(work(), 0.05)


every_cancellation = pytest.mark.parametrize(
    "cancel",
    [
        pytest.param(by_cancelling_the_task(1), id="task.cancel"),
        pytest.param(by_cancelling_the_task(3), id="task.cancel over and over"),
        pytest.param(by_a_scope, id="scope"),
        pytest.param(by_wait_for, id="wait_for"),
    ],
)


@every_cancellation
@pytest.mark.parametrize("behind", ["a task of its own process", "another process"])
@one_backend_of_each_kind
async def test_whoever_is_cancelled_while_it_waits_leaves_nothing_behind(
    side: Side, other: Side, key: StorageKey, behind: str, cancel: Cancel
) -> None:
    holder = other if behind == "another process" else side

    async def wait() -> None:
        async with side.lock(key):
            pytest.fail("the lock was held by two")

    async def ready() -> None:
        await until(lambda: side.wanted[key] == 1 + (holder is side))
        await anyio.sleep(random.uniform(0, 0.02))  # in a statement, or in a pause

    async with held(holder, key):
        await cancel(wait, ready)
        assert await side.locks() == {side.row(key): holder.owner}
        assert holder.isolation.still_held(key)
        with anyio.move_on_after(0.05) as limit:
            await enter(other, key)
        assert limit.cancelled_caught, "the holder's lock was freed"
    await enter(side, key)
    await enter(other, key)


@every_cancellation
@one_backend_of_each_kind
async def test_whoever_is_cancelled_while_it_holds_a_key_frees_it(
    side: Side, other: Side, key: StorageKey, cancel: Cancel
) -> None:
    entered = anyio.Event()

    async def hold() -> None:
        async with side.isolation.lock(key):
            entered.set()
            await anyio.sleep_forever()

    await cancel(hold, entered.wait)

    assert await other.locks() == {}
    await enter(other, key)
    await enter(side, key)


@on_each_driver
async def test_a_cancellation_at_any_moment_leaves_the_key_to_be_had(
    side: Side, other: Side, key: StorageKey
) -> None:
    async def use(each: Side) -> None:
        async with each.isolation.lock(key):
            await anyio.sleep(0.001)

    for number in range(30):
        tasks = [asyncio.ensure_future(use(each)) for each in (side, side, other)]
        await asyncio.sleep(number / 3000)
        for task in tasks[number % 2 :]:
            task.cancel()
        with anyio.fail_after(PATIENCE):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in outcomes} <= {type(None), asyncio.CancelledError}

    assert await side.locks() == {}
    await enter(side, key)
    await enter(other, key)


@pytest.mark.parametrize("behind", ["a task of its own process", "another process"])
@one_backend_of_each_kind
async def test_a_lock_that_is_not_to_be_had_within_wait_seconds_is_a_timeout(
    backend: Backend, start: Start, other: Side, key: StorageKey, behind: str
) -> None:
    side = await start(backend, wait=0.3)
    holder = other if behind == "another process" else side

    async with held(holder, key):
        began = time.monotonic()
        expected = rf"^could not acquire the lock for '{side.row(key)}' within 0.3 s: its holder"
        with pytest.raises(TimeoutError, match=expected), anyio.fail_after(PATIENCE):
            async with side.isolation.lock(key):
                pytest.fail("the lock was held by two")
        assert time.monotonic() - began >= 0.3
        assert await side.locks() == {side.row(key): holder.owner}
    await enter(side, key)
    await enter(other, key)


@pytest.mark.parametrize("backend", POSTGRESQL[:1], ids=str)
async def test_wait_limits_the_waiting_and_not_the_handler(
    backend: Backend, start: Start, key: StorageKey
) -> None:
    side = await start(backend, wait=0.5)
    async with side.isolation.lock(key):
        await anyio.sleep(0.6)
        assert side.isolation.still_held(key)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
@pytest.mark.parametrize("name", ["lease", "poll", "wait"])
def test_a_time_that_is_not_above_0_is_refused(name: str, seconds: float) -> None:
    storage = SQLAlchemyStorage(sessionmaker())

    arguments: dict[str, Any] = {name: seconds}
    with pytest.raises(ValueError, match=f"^{name} is a number of seconds above 0, not {seconds}$"):
        storage.create_isolation(**arguments)


# What is held, and what is not


@pytest.mark.parametrize("backend", POSTGRESQL[-1:], ids=str)
async def test_a_thousand_keys_leave_nothing_held_and_nothing_in_memory(
    backend: Backend, start: Start
) -> None:
    side = await start(
        backend, engine_options={"connect_args": {"server_settings": {"synchronous_commit": "off"}}}
    )
    tasks = len(asyncio.all_tasks())

    async def use(left: Iterator[StorageKey]) -> None:
        for key in left:
            async with side.isolation.lock(key):
                await asyncio.sleep(0)

    async def objects_after(number: int) -> int:
        left = iter(keys(number))
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(use, left)
        gc.collect()
        return len(gc.get_objects())

    before = await objects_after(100)
    assert await objects_after(1000) < before + 500
    assert await side.locks() == {}
    assert len(asyncio.all_tasks()) <= tasks + 1  # a renewal


@pytest.mark.parametrize(
    "options", [{}, {"pool_size": 1, "max_overflow": 0}], ids=["pool", "pool of one"]
)
async def test_no_connection_is_held_while_handlers_run(
    backend: Backend, start: Start, options: dict[str, Any]
) -> None:
    side = await start(backend, engine_options=options)
    inside = 0

    async def hold(key: StorageKey) -> None:
        nonlocal inside
        async with side.isolation.lock(key):
            inside += 1
            await until(lambda: inside == 6 and checked_out(side.engine) == 0)
            await side.storage.set_state(key, "in")
            await side.storage.set_state(key, None)

    async with anyio.create_task_group() as group:
        for key in keys(6):
            group.start_soon(hold, key)

    assert checked_out(side.engine) == 0


@one_backend_a_server
async def test_an_uncontended_lock_takes_one_statement_and_is_freed_by_one(
    backend: Backend, side: Side, key: StorageKey
) -> None:
    with statements(side.table.name) as seen:
        async with side.isolation.lock(key):
            taken = len(seen)

    # MySQL does not tell whether the insert has updated.
    assert taken == (2 if backend.server == "mariadb" else 1)
    assert len(seen) - taken == 1


async def test_still_held_tells_this_process_of_its_own_locks(
    side: Side, other: Side, key: StorageKey
) -> None:
    another = keys(1)[0]
    assert not side.isolation.still_held(key)
    with statements(side.table.name) as seen:
        async with side.isolation.lock(key):
            asked = len(seen)
            assert side.isolation.still_held(key)
            assert not side.isolation.still_held(another)
            assert not other.isolation.still_held(key)
            assert len(seen) == asked, "still_held() went to the database"
    assert not side.isolation.still_held(key)


async def test_a_task_that_only_waits_does_not_hold_the_key(
    side: Side, other: Side, key: StorageKey
) -> None:
    async with anyio.create_task_group() as group, held(other, key):
        group.start_soon(enter, side, key)
        await until(lambda: side.wanted[key] == 1)
        await give_way()
        assert not side.isolation.still_held(key)


@one_backend_of_each_kind
async def test_a_close_ends_no_renewals_of_what_is_held_and_is_no_end_of_use(
    backend: Backend, start: Start, key: StorageKey
) -> None:
    lease = 0.3
    side = await start(backend, lease=lease)
    for _ in range(2):
        await side.isolation.close()
        async with side.isolation.lock(key):
            await side.isolation.close()
            await renewed(side, await side.leases(), key)
        await side.isolation.close()
    with statements("UPDATE", side.table.name) as renewals:
        await anyio.sleep(lease)
    assert renewals == []


# Leases


async def test_a_lock_is_renewed_for_as_long_as_its_handler_runs(
    start: Start, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    """On all backends at once, since it takes its time."""
    lease = 2.0
    sides = [
        (await start(backend, lease=lease), await start(backend, lease=lease))
        for backend in SERVERS
    ]
    for side in itertools.chain(*sides):
        await enter(side, key)

    async def hold_for_two_leases(side: Side, other: Side) -> None:
        freed = anyio.Event()

        async def get_in() -> None:
            async with other.isolation.lock(key):
                assert freed.is_set(), "two were inside"

        async with anyio.create_task_group() as group, side.isolation.lock(key):
            group.start_soon(get_in)
            await anyio.sleep(2 * lease)
            assert side.isolation.still_held(key)
            assert await other.locks() == {side.row(key): side.owner}
            freed.set()

    async with anyio.create_task_group() as group:
        for side, other in sides:
            group.start_soon(hold_for_two_leases, side, other)

    assert lost(caplog) == []


@pytest.mark.parametrize("backend", POSTGRESQL[:1], ids=str)
async def test_a_lock_that_was_long_in_coming_is_renewed_in_time(
    backend: Backend, start: Start, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lease counts from the moment of asking."""
    lease = 3.0
    side, other = [await start(backend, lease=lease) for _ in range(2)]
    await side.execute(
        "INSERT INTO TABLE_OF_LOCKS (id, owner, expires, version)"
        f" VALUES ('{side.row(key)}', 'dead', 0, 1)"
    )
    inside = anyio.Event()

    async def hold() -> None:
        async with side.isolation.lock(key):
            inside.set()
            await anyio.sleep(lease)
            assert side.isolation.still_held(key)
            assert await other.locks() == {side.row(key): side.owner}

    def keep_waiting(session: Session) -> None:
        session.execute(select(other.table).with_for_update()).all()

    async with anyio.create_task_group() as group:
        async with other.storage.transaction():
            await other.storage.run_sync(keep_waiting)
            group.start_soon(hold)
            await anyio.sleep(0.8 * lease)
        await inside.wait()
        await enter(other, key)
    assert lost(caplog) == []


@pytest.mark.parametrize("backend", [SQLITE[0], POSTGRESQL[0]], ids=str)
async def test_many_locks_are_renewed_by_few_statements(
    backend: Backend, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    number, lease = 501, 2.0  # one more than a statement renews
    side = await start(backend, lease=lease)
    leave = anyio.Event()
    inside = 0

    async def hold(key: StorageKey) -> None:
        nonlocal inside
        async with side.isolation.lock(key):
            inside += 1
            await leave.wait()

    async with anyio.create_task_group() as group:
        for key in keys(number):
            group.start_soon(hold, key)
        await until(lambda: inside == number)
        before = await side.leases()
        began = time.monotonic()
        with statements("UPDATE", side.table.name, "SET expires") as renewals:
            await renewed(side, before, *keys(number))
        beats = (time.monotonic() - began) / (lease / 3) + 1
        assert 2 <= len(renewals) <= 2 * (beats + 1)
        assert all(side.isolation.still_held(key) for key in keys(number))
        leave.set()

    assert lost(caplog) == []


async def renewed(side: Side, before: dict[str, tuple[str, float]], *keys: StorageKey) -> None:
    """Wait until locks end later than before."""
    rows = [side.row(key) for key in keys]
    with anyio.fail_after(PATIENCE):
        while True:
            now = await side.leases()
            if all(now[row] != before[row] for row in rows):
                return
            await anyio.sleep(0.02)


def lost(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of lost locks."""
    return [each for each in messages(caplog) if "is lost" in each]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the package logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "hybrid_storage" and record.levelno == logging.WARNING
    ]


class Stuck:
    """A process whose event loop stands still as soon as it has a lock: nothing is renewed.

    :param backend: its backend
    :param url: its database
    :param table: the storage's table
    :param key: whose lock it takes
    :param lease: for how many seconds
    """

    def __init__(
        self, backend: Backend, url: URL, table: str, key: StorageKey, lease: float
    ) -> None:
        self._backend = backend
        self._url = url
        self._table = table
        self._key = key
        self._lease = lease
        self._holds = ThreadEvent()
        self._may_go_on = ThreadEvent()
        self._may_end = ThreadEvent()
        #: before it asked for the lock, by time.monotonic()
        self.began = 0.0
        #: what its handler saw: as soon as the loop went on, and at the end
        self.still_held: list[bool] = []
        #: what it sees now
        self.sees_it_held = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Future[str], None]:
        """Run it in a thread, and wait until it has the lock; return what its handler returns."""
        result = asyncio.ensure_future(
            anyio.to_thread.run_sync(lambda: asyncio.run(self._run()), limiter=None)
        )
        try:
            await until(lambda: self._holds.is_set() or result.done())
            yield result
        finally:
            self.go_on()
            self._may_end.set()
            await result

    def go_on(self) -> None:
        """Let its event loop run again."""
        self._may_go_on.set()

    def end(self) -> None:
        """Let its handler return."""
        self._may_end.set()

    async def _run(self) -> str:
        engine = self._backend.engine(self._url)
        storage: SQLAlchemyStorage = SQLAlchemyStorage(
            self._backend.factory(engine), table_name=self._table
        )
        isolation = storage.create_isolation(lease=self._lease)
        try:
            return await self._handler(isolation)
        finally:
            await isolation.close()
            await until(lambda: checked_out(engine) == 0)  # a last renewal may be under way
            await dispose(engine)

    async def _handler(self, isolation: SQLAlchemyEventIsolation) -> str:
        self.began = time.monotonic()
        async with isolation.lock(self._key):
            self._holds.set()
            self._may_go_on.wait(PATIENCE)
            self.still_held.append(isolation.still_held(self._key))
            while not self._may_end.is_set():
                self.sees_it_held = isolation.still_held(self._key)
                await anyio.sleep(0.002)
            self.still_held.append(isolation.still_held(self._key))
            return "its result"


@on_each_driver
async def test_a_lock_is_taken_over_once_its_lease_has_ended_and_not_before(
    backend: Backend, side: Side, key: StorageKey, url_of: Callable[[Backend], URL]
) -> None:
    lease = 0.4
    stuck = Stuck(backend, url_of(backend), side.storage.table.name, key, lease)

    async with stuck.running():
        with anyio.fail_after(PATIENCE):
            async with side.isolation.lock(key):
                waited = time.monotonic() - stuck.began
        assert lease - 0.002 <= waited <= lease + 10  # SQLite counts milliseconds


@on_each_driver
async def test_a_lost_lock_is_logged_once_and_spares_the_handler_and_the_next_holder(
    backend: Backend,
    side: Side,
    key: StorageKey,
    url_of: Callable[[Backend], URL],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lease = 0.3
    stuck = Stuck(backend, url_of(backend), side.storage.table.name, key, lease)

    async with stuck.running() as result, side.isolation.lock(key):
        stuck.go_on()
        await until(lambda: bool(lost(caplog)))
        await anyio.sleep(lease)  # it may be said again by the next renewals
        stuck.end()
        assert await result == "its result"
        assert stuck.still_held == [False, False]
        assert await side.locks() == {side.row(key): side.owner}
        assert side.isolation.still_held(key)

    [message] = lost(caplog)
    assert message == (
        f"the lock of '{side.row(key)}' is lost while its handler runs, so that another may run "
        "at the same time: another process has taken it over"
    )


@one_backend_a_server
async def test_a_lock_that_nobody_took_over_is_held_again_after_a_standstill(
    backend: Backend, side: Side, key: StorageKey, url_of: Callable[[Backend], URL]
) -> None:
    lease = 0.3
    stuck = Stuck(backend, url_of(backend), side.storage.table.name, key, lease)

    async with stuck.running():
        await anyio.sleep(lease)
        before = await side.leases()
        stuck.go_on()
        await renewed(side, before, key)
        # Whatever the machine is busy with: some renewal will be seen in time.
        await until(lambda: stuck.sees_it_held)

    assert stuck.still_held[0] is False


@one_backend_a_server
async def test_a_lock_that_cannot_be_renewed_in_time_is_lost_and_its_handler_ends_as_ever(
    backend: Backend, start: Start, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    side = await start(backend, lease=0.6)
    async with side.isolation.lock(key):
        assert side.isolation.still_held(key)
        await side.execute("DROP TABLE TABLE_OF_LOCKS")
        await until(lambda: not side.isolation.still_held(key))
        await until(lambda: bool(lost(caplog)))
        await side.storage.create_table()
        await anyio.sleep(0.3)
        assert not side.isolation.still_held(key)

    [message] = lost(caplog)
    assert f"'{side.row(key)}'" in message
    assert "it could not be renewed in time: " in message
    await enter(side, key)
    assert len(messages(caplog)) == 1


@one_backend_a_server
async def test_a_database_that_is_away_for_less_than_a_lease_costs_nothing(
    backend: Backend, start: Start, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    side = await start(backend, lease=3.0)
    async with side.isolation.lock(key):
        before = await side.leases()
        with statements("UPDATE", side.table.name) as renewals:
            await side.execute("ALTER TABLE TABLE_OF_LOCKS RENAME TO away_TABLE_OF_LOCKS")
            await until(lambda: len(renewals) == 1)
            await side.execute("ALTER TABLE away_TABLE_OF_LOCKS RENAME TO TABLE_OF_LOCKS")
        await renewed(side, before, key)
        assert side.isolation.still_held(key)

    assert messages(caplog) == []


async def test_a_lock_that_cannot_be_freed_is_logged_and_the_handler_ends_as_ever(
    side: Side, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    async with side.isolation.lock(key):
        await side.execute("DROP TABLE TABLE_OF_LOCKS")

    [message] = messages(caplog)
    assert message.startswith(f"could not free the lock of '{side.row(key)}': ")
    await side.storage.create_table()


async def test_without_the_table_the_error_says_how_to_create_it(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    isolation = storage.create_isolation()

    for _ in range(2):
        with pytest.raises(DBAPIError, match=r"_lock' is missing.*await storage.create_table\("):
            async with isolation.lock(key):
                pytest.fail("locked without a table")


# The clock is the database's


@pytest.mark.parametrize("hours", [-1000, 1000])
@one_backend_a_server
async def test_the_clock_of_the_process_makes_no_difference(
    side: Side, other: Side, key: StorageKey, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + hours * 3600)
        context = side.isolation.lock(key)
        await context.__aenter__()
        began = now()
    try:
        [(_, ends)] = (await side.leases()).values()
        assert abs(ends - began - 30) < 20
        with anyio.move_on_after(0.1) as limit:
            await enter(other, key)
        assert limit.cancelled_caught, "two were inside"
    finally:
        await context.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("backend", "statement"),
    [
        *[(backend, "SET TIME ZONE 'Pacific/Auckland'") for backend in POSTGRESQL],
        *[(backend, "SET time_zone = '+13:00'") for backend in MARIADB],
    ],
    ids=str,
)
async def test_the_time_zone_of_a_connection_makes_no_difference(
    backend: Backend, start: Start, key: StorageKey, statement: str
) -> None:
    side, other = await start(backend), await start(backend)

    @event.listens_for(other.engine, "begin")
    def travel(connection: Connection) -> None:
        connection.exec_driver_sql(statement)

    async with side.isolation.lock(key):
        with anyio.move_on_after(0.1) as limit:
            await enter(other, key)
        assert limit.cancelled_caught, "two were inside"
    ends = []
    for each in (side, other):
        async with each.isolation.lock(key):
            ends += [end for _, end in (await side.leases()).values()]
    assert abs(ends[1] - ends[0]) < 20


# The table


def names(metadata: MetaData) -> set[str]:
    """Return the names of the tables."""
    return set(metadata.tables)


def test_the_table_of_locks_is_declared_where_isolation_is_used() -> None:
    metadata = MetaData(schema="bots")
    storage = SQLAlchemyStorage(sessionmaker(), metadata, "conversation")
    assert names(metadata) == {"bots.conversation"}

    storage.create_isolation()
    storage.create_isolation()
    SQLAlchemyStorage(sessionmaker(), metadata, "conversation").create_isolation()

    assert names(metadata) == {"bots.conversation", "bots.conversation_lock"}


def test_a_name_that_a_table_of_the_applications_has_is_refused() -> None:
    metadata = MetaData()
    Table("conversation_lock", metadata, Column("number", Integer, primary_key=True))
    storage = SQLAlchemyStorage(sessionmaker(), metadata, "conversation")

    with pytest.raises(
        ValueError, match=r"'conversation_lock' is taken by a different table .*: number"
    ):
        storage.create_isolation()


@pytest.mark.parametrize("isolated", [False, True])
def test_create_all_and_alembic_make_the_table_of_locks_where_isolation_is_used(
    tmp_path: Path, isolated: bool
) -> None:
    class Base(DeclarativeBase):
        pass

    engine = create_engine(f"sqlite:///{tmp_path}/fsm.db")
    storage = SQLAlchemyStorage(sessionmaker(engine), Base)
    expected = {"aiogram_fsm_data"}
    if isolated:
        storage.create_isolation()
        expected |= {"aiogram_fsm_data_lock"}

    with engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        script = produce_migrations(context, Base.metadata)
        assert script.upgrade_ops is not None
        for operation in script.upgrade_ops.ops:
            Operations(context).invoke(operation)
        assert set(inspect(connection).get_table_names()) == expected
        assert compare_metadata(context, Base.metadata) == []
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    assert set(inspect(engine).get_table_names()) == expected
    engine.dispose()


# With a dispatcher and transactions


class Base(DeclarativeBase):
    """The application's."""


class Step(Base):
    """A row that a handler writes."""

    __tablename__ = "isolation_step"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


def update(number: int) -> Update:
    """Return an update: always the same user's."""
    message = Message(
        message_id=number,
        date=datetime.now(timezone.utc),
        chat=Chat(id=7, type="private"),
        from_user=User(id=7, is_bot=False, first_name="Ada"),
        text=str(number),
    )
    return Update(update_id=number, message=message)


def dispatcher(side: Side, order: list[int]) -> Dispatcher:
    """Return a bot that counts in a way that needs isolation, and writes down what it took."""
    dp = Dispatcher(storage=side.storage, events_isolation=side.isolation)

    @dp.message()
    async def step(message: Message, state: FSMContext) -> None:
        count = await state.get_value("count", 0)
        await anyio.sleep(0.005)
        await state.update_data(count=count + 1)
        order.append(message.message_id)

    return dp


async def test_updates_of_a_user_that_come_at_once_are_handled_in_order_by_a_dispatcher(
    side: Side,
) -> None:
    order: list[int] = []
    dp = dispatcher(side, order)
    bot = Bot("42:TEST")

    await asyncio.gather(*[dp.feed_update(bot, update(number)) for number in range(10)])

    assert order == list(range(10))
    key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    assert await side.storage.get_data(key) == {"count": 10}
    await dp.emit_shutdown()
    await side.storage.clear(key)


@one_backend_of_each_kind
async def test_two_dispatchers_lose_no_step_of_a_user(side: Side, other: Side) -> None:
    order: list[int] = []
    bots = [dispatcher(each, order) for each in (side, other)]
    bot = Bot("42:TEST")

    with anyio.fail_after(PATIENCE):
        await asyncio.gather(
            *[bots[number % 2].feed_update(bot, update(number)) for number in range(12)]
        )

    assert sorted(order) == list(range(12))
    assert order[::2] != order[1::2]
    key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    assert await side.storage.get_data(key) == {"count": 12}
    await side.storage.clear(key)


@one_backend_of_each_kind
async def test_with_session_middleware_each_update_is_a_transaction_inside_of_its_lock(
    backend: Backend, start: Start, open_storage: Open
) -> None:
    side, other = await start(backend), await start(backend)
    bot = Bot("42:TEST")
    key = StorageKey(bot_id=42, chat_id=7, user_id=7)
    storages = [each.storage for each in (side, other)]
    await storages[0].run_sync(
        lambda session: Base.metadata.create_all(session.connection(), checkfirst=True)
    )

    def isolated(each: Side) -> Dispatcher:
        dp = Dispatcher(storage=each.storage, events_isolation=each.isolation)
        dp.update.outer_middleware(SessionMiddleware(each.storage))

        @dp.message()
        async def step(message: Message, state: FSMContext, session: Any) -> None:
            count = await state.get_value("count", 0)
            await anyio.sleep(0.002)
            session.add(Step(number=count))
            await state.update_data(count=count + 1)
            if message.message_id % 4 == 3:
                raise LookupError("not this one")

        return dp

    bots = [isolated(side), isolated(other)]
    with anyio.fail_after(PATIENCE):
        results = await asyncio.gather(
            *[bots[number % 2].feed_update(bot, update(number)) for number in range(12)],
            return_exceptions=True,
        )

    def numbers(session: Session) -> list[int]:
        return list(session.scalars(select(Step.number).order_by(Step.id)))

    try:
        assert [type(each) for each in results].count(LookupError) == 3
        assert await side.storage.get_data(key) == {"count": 9}
        assert await side.storage.run_sync(numbers) == list(range(9))
        await side.storage.clear(key)
    finally:
        await side.storage.run_sync(
            lambda session: Base.metadata.drop_all(session.connection(), checkfirst=True)
        )


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_on_sqlite_a_lock_may_be_taken_and_freed_in_a_transaction(
    backend: Backend, start: Start, key: StorageKey
) -> None:
    """It joins the transaction, which holds the file's write lock: nobody else can take it."""
    side, other = await start(backend), await start(backend)
    async with side.storage.transaction():
        await side.storage.set_state(key, "inside")
        async with side.isolation.lock(key):
            assert side.isolation.still_held(key)
            await side.storage.update_data(key, {"name": "Ada"})
    assert await other.locks() == {}
    assert await side.storage.get_state(key) == "inside"
    async with other.isolation.lock(key):
        assert other.isolation.still_held(key)


@pytest.mark.parametrize("backend", [*POSTGRESQL, *MARIADB], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"pool_size": 1, "max_overflow": 0}], ids=["pool", "pool of one"]
)
async def test_a_lock_taken_in_a_transaction_is_no_part_of_it(
    backend: Backend, start: Start, key: StorageKey, options: dict[str, Any]
) -> None:
    side, other = await start(backend, engine_options=options), await start(backend)
    row = side.row(key)
    async with AsyncExitStack() as lock:
        with pytest.raises(LookupError):
            async with side.storage.transaction():
                await side.storage.get_state(key)
                await lock.enter_async_context(side.isolation.lock(key))
                assert await other.locks() == {row: side.owner}
                await side.storage.set_state(key, "rolled back")
                raise LookupError
        assert await other.locks() == {row: side.owner}
        assert side.isolation.still_held(key)
        async with side.storage.transaction():
            await side.storage.get_state(key)
            await lock.aclose()
            assert await other.locks() == {}
    assert await side.storage.get_state(key) is None


# Where the database is in the way


@contextmanager
def written_to(file: str | None, seconds: float) -> Generator[None, None, None]:
    """Let another process write to a SQLite file for some seconds, which nobody else can then."""
    assert file is not None
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        timer = asyncio.get_running_loop().call_later(seconds, connection.rollback)
        try:
            yield
        finally:
            timer.cancel()


IMPATIENT: dict[str, Any] = {"connect_args": {"timeout": 0.05}}  # of SQLite's busy handler


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_a_lock_that_took_longer_than_a_lease_to_get_is_held(
    backend: Backend, start: Start, key: StorageKey
) -> None:
    side = await start(backend, lease=0.5, engine_options=IMPATIENT)
    with written_to(side.engine.url.database, seconds=0.7):
        async with side.isolation.lock(key):
            assert await side.locks() == {side.row(key): side.owner}
            assert side.isolation.still_held(key)


@pytest.mark.parametrize("backend", SQLITE, ids=str)
async def test_a_busy_database_does_not_make_the_wait_longer(
    backend: Backend, start: Start, key: StorageKey
) -> None:
    side = await start(backend, wait=0.3, engine_options=IMPATIENT)
    with written_to(side.engine.url.database, seconds=4):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with side.isolation.lock(key):
                pytest.fail("locked in a file that nobody could write to")
        waited = time.monotonic() - began
    assert waited < 3


async def test_a_lock_asked_for_in_a_transaction_on_the_only_connection_there_is_joins_it(
    key: StorageKey,
) -> None:
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    storage = SQLAlchemyStorage(sessionmaker(engine))
    isolation = storage.create_isolation(wait=0.2)
    await storage.create_table()

    async with storage.transaction():
        await storage.set_state(key, "written")
        with anyio.fail_after(3):  # it would wait for the connection of its own task
            async with isolation.lock(key):
                pass
    engine.dispose()
