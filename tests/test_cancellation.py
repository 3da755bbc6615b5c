"""What a cancellation does: a call ends soon, wholly or not at all, and nothing comes afterwards.

PyMySQL and asyncmy have no way to end a statement: there the call waits for its end first.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import anyio
import pytest
from aiogram.fsm.storage.base import StorageKey
from anyio import CancelScope, CapacityLimiter
from anyio.lowlevel import checkpoint
from backends import BACKENDS, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import PATIENCE, give_way, locked, statements, until
from conftest import Open, drop_table
from sqlalchemy import URL, Engine, event, text
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage._engine.cancellation import run_to_completion

LONG = text(
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 30000000)"
    " SELECT count(*) FROM t"
)
"""A statement that takes SQLite several seconds."""
Call = Callable[[], Coroutine[Any, Any, object]]
How = Callable[[Call, asyncio.Event], Awaitable[None]]


# The ways to cancel a call as soon as an event is set, each of which checks what its caller sees.


async def cancel(call: Call, now: asyncio.Event) -> None:
    task = asyncio.create_task(call())
    await now.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_thrice(call: Call, now: asyncio.Event) -> None:
    task = asyncio.create_task(call())
    await now.wait()
    task.cancel()
    task.cancel()
    await checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def wait_for(call: Call, now: asyncio.Event) -> None:
    task = asyncio.create_task(call())
    await now.wait()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(task, 0)


async def in_scope(call: Call, scope: CancelScope) -> None:
    with scope:
        await call()
        # As anyio has it: a call that is shielded returns, and the next one is cancelled.
        await checkpoint()
        pytest.fail("the cancellation went lost")
    assert scope.cancelled_caught


async def cancel_scope(call: Call, now: asyncio.Event) -> None:
    scope = CancelScope()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_scope, call, scope)
        await now.wait()
        scope.cancel()


async def move_on_after(call: Call, now: asyncio.Event) -> None:
    scope = anyio.move_on_after(PATIENCE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_scope, call, scope)
        await now.wait()
        scope.deadline = anyio.current_time()


async def cancel_scope_and_task(call: Call, now: asyncio.Event) -> None:
    scope = CancelScope()

    async def work() -> None:
        with scope:
            await call()
            await checkpoint()

    task = asyncio.create_task(work())
    await now.wait()
    scope.cancel()
    await checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


HOW: list[How] = [cancel, cancel_thrice, wait_for, cancel_scope, move_on_after]
SQLITE_WAITS = 0.3  # seconds for the file's lock: nothing ends that wait before


def name_of(how: How) -> str:
    return str(getattr(how, "__name__", how))


def can_interrupt(backend: Backend) -> bool:
    """Tell whether the driver can end a statement."""
    return backend.server != "mariadb"


@pytest.fixture
async def storage(backend: Backend, open_storage: Open) -> SQLAlchemyStorage:
    """Return a storage that waits for SQLite's lock for a moment only."""
    arguments = {"timeout": SQLITE_WAITS} if backend.server == "sqlite" else {}
    opened = await open_storage(backend, engine_options={"connect_args": arguments})
    assert isinstance(opened, SQLAlchemyStorage)
    return opened


# What has begun


@pytest.mark.parametrize("how", [*HOW, cancel_scope_and_task], ids=name_of)
async def test_a_write_that_waits_for_a_lock_ends_if_it_is_cancelled(
    backend: Backend,
    how: How,
    storage: SQLAlchemyStorage,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
) -> None:
    """Where the driver can end it: else its end is waited for before the cancellation goes on."""
    await storage.set_data(key, {"name": "Ada"})
    now = asyncio.Event()
    with locked(backend, url_of(backend), storage, key) as lock:
        caller = asyncio.ensure_future(how(lambda: storage.update_data(key, {"age": 36}), now))
        await lock.is_waited_for()
        now.set()
        if can_interrupt(backend):
            with anyio.fail_after(PATIENCE / 2):  # the lock is held for PATIENCE
                await caller
        else:
            await give_way()
            assert not caller.done()
        lock.release()
        await caller
    await give_way()
    data = await storage.get_data(key)
    whole = {"name": "Ada", "age": 36}
    assert data == {"name": "Ada"} or (data == whole and not can_interrupt(backend))
    await storage.set_state(key, "usable")
    assert await storage.get_state(key) == "usable"


@pytest.mark.parametrize("backend", [*POSTGRESQL, *SQLITE], ids=str)
async def test_a_statement_at_work_is_ended_by_a_cancellation(
    backend: Backend, storage: SQLAlchemyStorage
) -> None:
    """One that waits for no lock, but takes its time: 60 s in PostgreSQL, some 20 s in SQLite."""
    endless = {
        "postgresql": "SELECT pg_sleep(60)",
        "sqlite": (
            "WITH RECURSIVE number(n) AS"
            " (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 100000000)"
            " SELECT count(*) FROM number"
        ),
    }[backend.server]

    with statements("SELECT") as begun:
        task = asyncio.create_task(storage.run_sync(lambda session: session.scalar(text(endless))))
        await until(lambda: bool(begun))
        await anyio.sleep(0.05)
        task.cancel()
        with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
            await task
    assert await storage.run_sync(lambda session: session.scalar(text("SELECT 5"))) == 5


@pytest.mark.parametrize("backend", SQLITE, ids=str)
@pytest.mark.parametrize("how", [cancel, cancel_thrice, wait_for], ids=name_of)
async def test_a_function_that_is_cancelled_in_a_transaction_leaves_the_file_unlocked(
    backend: Backend, how: How, open_storage: Open, key: StorageKey
) -> None:
    """SQLite would keep the lock for as long as a traceback has the cursor of a statement."""
    options = {"poolclass": NullPool, "connect_args": {"timeout": 0.1}}
    storage = await open_storage(backend, engine_options=options, retry_for=0)
    started = asyncio.Event()

    async def call() -> None:
        async with storage.transaction():
            await storage.set_state(key, "lost")
            asyncio.get_running_loop().call_later(0.2, started.set)
            await storage.run_sync(lambda session: session.execute(LONG))

    gc.disable()  # it would close the cursor at some time
    try:
        await how(call, started)
        await storage.set_state(key, "kept")
    finally:
        gc.enable()
    assert await storage.get_state(key) == "kept"


@pytest.mark.parametrize("backend", SERVERS, ids=str)
@pytest.mark.parametrize("how", [cancel, wait_for], ids=name_of)
async def test_an_error_after_the_cancellation_is_not_logged_as_never_retrieved(
    backend: Backend,
    how: How,
    storage: SQLAlchemyStorage,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await storage.set_data(key, {"name": "Ada"})
    unhandled: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    now = asyncio.Event()
    with locked(backend, url_of(backend), storage, key) as lock:
        caller = asyncio.ensure_future(how(lambda: storage.update_data(key, {"age": 36}), now))
        await lock.is_waited_for()
        now.set()
        await give_way()
        lock.write(data="[5]")  # an update that reads on takes it for corrupt
        lock.release()
        await caller
    del caller
    gc.collect()
    await give_way()
    loop.set_exception_handler(handler)
    assert unhandled == []
    assert caplog.records == []


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_a_call_that_is_closed_in_the_middle_raises_nothing(
    backend: Backend, storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    """As the garbage collector does it to coroutines that nobody awaits to their end."""
    await storage.set_state(key, "before")
    for steps in (1, 2, 3):
        call = storage.set_state(key, "after")
        for _ in range(steps):
            try:
                waited_for = call.send(None)
            except StopIteration:
                break
            if waited_for is not None:  # a future, which must be done before it goes on
                await asyncio.wait([waited_for])
        call.close()
    await give_way()
    await storage.set_state(key, "later")
    assert await storage.get_state(key) == "later"


async def is_swallowed_by_anyio(first: str) -> bool:
    """Tell whether anyio by itself takes an outer cancellation for that of its scope.

    It does before Python 3.11, and before anyio 4.16, if its scope has been cancelled first.
    """
    inner = CancelScope()

    async def sleep() -> None:
        with inner:
            await anyio.sleep_forever()

    task = asyncio.create_task(sleep())
    await give_way()
    for cancel in (inner.cancel, task.cancel)[:: 1 if first == "inner" else -1]:
        cancel()
    await asyncio.wait([task])
    return not task.cancelled()


@pytest.mark.parametrize("first", ["inner", "outer"])
async def test_an_inner_time_out_and_an_outer_cancellation_may_come_in_one_turn_of_the_loop(
    backend: Backend,
    first: str,
    storage: SQLAlchemyStorage,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
) -> None:
    await storage.set_state(key, "before")
    inner = CancelScope()

    async def call() -> None:
        with inner:
            await storage.set_state(key, "after")

    with locked(backend, url_of(backend), storage, key) as lock:
        task = asyncio.create_task(call())
        await lock.is_waited_for()
        for cancel in (inner.cancel, task.cancel)[:: 1 if first == "inner" else -1]:
            cancel()
        await give_way()
        lock.release()
        with (
            suppress(asyncio.CancelledError)
            if await is_swallowed_by_anyio(first)
            else pytest.raises(asyncio.CancelledError)
        ):
            await task
    await storage.set_state(key, "later")
    assert await storage.get_state(key) == "later"


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_scopes_around_and_beside_calls_end_on_their_own(
    backend: Backend, storage: SQLAlchemyStorage, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    await storage.set_state(key, "before")
    with anyio.move_on_after(PATIENCE) as outer:
        with locked(backend, url_of(backend), storage, key) as lock:

            async def expire() -> None:
                await lock.is_waited_for()
                inner.cancel()
                await give_way()
                if not can_interrupt(backend):
                    lock.release()

            async with anyio.create_task_group() as tasks:
                with CancelScope() as inner:
                    tasks.start_soon(expire)
                    await storage.set_state(key, "after")
                    await checkpoint()
                assert inner.cancelled_caught
        await storage.set_state(key, "later")
        with CancelScope(shield=True):
            assert await storage.get_state(key) == "later"
    assert not outer.cancelled_caught


class Gate:
    """Stops the statement that carries a marker, until it is opened."""

    def __init__(self, marker: str, is_async: bool) -> None:
        self.reached = threading.Event()
        self._marker = marker
        self._open: Any = asyncio.Event() if is_async else threading.Event()
        self._is_async = is_async

    def open(self) -> None:
        self._open.set()

    def stop(self, _: object, cursor: object, statement: str, parameters: object, *__: Any) -> None:
        if self._marker in str(parameters):
            self.reached.set()
            if self._is_async:
                await_only(self._open.wait())
            else:
                assert self._open.wait(PATIENCE)


@contextmanager
def gate(marker: str, is_async: bool) -> Iterator[Gate]:
    closed = Gate(marker, is_async)
    event.listen(Engine, "before_cursor_execute", closed.stop)
    try:
        yield closed
    finally:
        closed.open()
        event.remove(Engine, "before_cursor_execute", closed.stop)


async def test_a_cancelled_write_does_not_land_after_a_newer_one(
    backend: Backend, storage: SQLAlchemyStorage, key: StorageKey
) -> None:
    async def write() -> None:
        try:
            await storage.set_state(key, "older")
        finally:
            await storage.set_state(key, "newer")

    with gate("older", backend.is_async) as closed:
        task = asyncio.create_task(write())
        await until(closed.reached.is_set)
        task.cancel()
        await give_way()
        closed.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        await give_way()
    assert await storage.get_state(key) == "newer"


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_loop_that_ends_leaves_nothing_locked(
    backend: Backend,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = backend.engine(
        url_of(backend), **({"poolclass": NullPool} if backend.is_async else {})
    )
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    left_behind: list[asyncio.Task[Any]] = []

    async def main() -> None:
        await storage.create_table()
        await storage.set_state(key, "waiting")
        holding = asyncio.Event()

        async def hold_until_cancelled() -> None:
            with locked(backend, url_of(backend), storage, key) as lock:
                left_behind.append(asyncio.create_task(storage.set_state(key, "written")))
                await lock.is_waited_for()
                holding.set()
                await anyio.sleep_forever()

        left_behind.append(asyncio.create_task(hold_until_cancelled()))
        await holding.wait()

    async def later() -> str | None:
        state = await storage.get_state(key)
        await storage.set_state(key, "later")
        return state

    asyncio.run(main())
    assert all(task.cancelled() for task in left_behind)
    assert asyncio.run(later()) in {"written", "waiting"}
    asyncio.run(drop_table(storage, engine))
    assert caplog.records == []


@pytest.mark.parametrize("backend", [*POSTGRESQL, *SQLITE], ids=str)
@pytest.mark.parametrize("turns", range(4))
def test_a_loop_may_end_while_a_statement_is_being_cancelled(
    backend: Backend,
    turns: int,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop cancels its tasks once more, before or after the driver has begun to cancel.

    asyncpg does that in a task of its own, which nothing keeps from being cancelled.
    """
    options: dict[str, Any] = {"poolclass": NullPool} if backend.is_async else {}
    if backend.server == "sqlite":
        options["connect_args"] = {"timeout": SQLITE_WAITS}
    engine = backend.engine(url_of(backend), **options)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    calls: list[asyncio.Task[None]] = []

    async def prepare() -> None:
        await storage.create_table()
        await storage.set_state(key, "waiting")

    async def cancel_and_end() -> None:
        calls.append(asyncio.create_task(storage.set_state(key, "written")))
        await lock.is_waited_for()
        calls[0].cancel()
        for _ in range(turns):
            await checkpoint()

    asyncio.run(prepare())
    with locked(backend, url_of(backend), storage, key) as lock:
        asyncio.run(cancel_and_end())
        assert calls[0].cancelled()
        if backend.driver != "asyncpg" or turns == 0:
            lock.release()
            assert asyncio.run(storage.get_state(key)) == "waiting"
    asyncio.run(drop_table(storage, engine))
    assert caplog.records == []


@pytest.mark.parametrize("backend", [*POSTGRESQL, *SQLITE], ids=str)
@pytest.mark.parametrize("turns", range(4))
async def test_all_tasks_may_be_cancelled_while_a_statement_is_being_cancelled(
    backend: Backend,
    turns: int,
    storage: SQLAlchemyStorage,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a program does that shuts down by itself: the tasks of this call's are among them."""
    await storage.set_state(key, "waiting")
    earlier = asyncio.all_tasks()
    with locked(backend, url_of(backend), storage, key) as lock:
        call = asyncio.create_task(storage.set_state(key, "written"))
        await lock.is_waited_for()
        call.cancel()
        for _ in range(turns):
            await checkpoint()
        for task in asyncio.all_tasks() - earlier:
            task.cancel()
        with anyio.fail_after(PATIENCE / 2), pytest.raises(asyncio.CancelledError):
            await call
        if backend.driver != "asyncpg" or turns == 0:
            lock.release()
            await give_way()
            assert await storage.get_state(key) == "waiting"
    assert caplog.records == []


async def test_a_time_out_of_a_drivers_works_when_its_call_has_been_cancelled() -> None:
    """asyncio's cancel the task that they are used in, the second time here."""
    ended: list[str] = []

    async def drive() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            for name in ("first", "second"):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.Event().wait(), 0.001)
                ended.append(name)

    call = asyncio.create_task(run_to_completion(drive, cancels=True))
    await give_way()
    call.cancel()
    with anyio.fail_after(PATIENCE), pytest.raises(asyncio.CancelledError):
        await call
    assert ended == ["first", "second"]


if sys.version_info >= (3, 11):

    @pytest.mark.parametrize("expiring", ["inner", "outer", "both"])
    async def test_a_timeout_that_expires_is_over_when_it_has_been_caught(
        backend: Backend,
        expiring: str,
        storage: SQLAlchemyStorage,
        url_of: Callable[[Backend], URL],
        key: StorageKey,
    ) -> None:
        await storage.set_state(key, "waiting")
        this_task = asyncio.current_task()
        assert this_task is not None
        caught: list[str] = []

        async def expire() -> None:
            await lock.is_waited_for()
            for name, timeout in (("inner", inner), ("outer", outer)):
                if expiring in (name, "both"):
                    timeout.reschedule(0)
            if can_interrupt(backend):  # with the lock gone, the write could come first
                await until(lambda: bool(caught))
            await give_way()
            lock.release()

        with locked(backend, url_of(backend), storage, key) as lock:
            expirer = asyncio.create_task(expire())
            try:
                async with asyncio.timeout(None) as outer:
                    try:
                        async with asyncio.timeout(None) as inner:
                            await storage.set_state(key, "written")
                    except TimeoutError:
                        caught.append("inner")
                    await checkpoint()
            except TimeoutError:
                caught.append("outer")
            await expirer
        assert caught == ["outer" if expiring == "both" else expiring]
        assert this_task.cancelling() == 0
        state = await storage.get_state(key)
        assert state == "waiting" or (state == "written" and not can_interrupt(backend))


# What has not begun


@pytest.mark.parametrize("backend", SQLITE, ids=str)  # no driver is asked
@pytest.mark.parametrize("how", HOW, ids=name_of)
async def test_a_call_that_is_cancelled_before_its_turn_does_nothing(
    backend: Backend, how: How, open_storage: Open, key: StorageKey
) -> None:
    limiter = CapacityLimiter(1)
    storage = await open_storage(backend, limiter=limiter)
    another = object()
    limiter.acquire_on_behalf_of_nowait(another)
    now = asyncio.Event()
    with statements(storage.table.name) as seen, anyio.fail_after(PATIENCE):
        caller = asyncio.ensure_future(how(lambda: storage.set_state(key, "written"), now))
        await until(lambda: limiter.statistics().tasks_waiting == 1)
        now.set()
        await caller
        assert limiter.statistics().tasks_waiting == 0
        limiter.release_on_behalf_of(another)
        await give_way()
    assert seen == []
    assert await storage.get_state(key) is None
    assert limiter.borrowed_tokens == 0


async def test_a_call_that_is_cancelled_in_the_queue_for_a_pool_ends_at_once(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    one = {"pool_size": 1, "max_overflow": 0}
    storage: SQLAlchemyStorage = await open_storage(backend, engine_options=one)
    await storage.set_state(key, "waiting")
    async with anyio.create_task_group() as tasks:
        with locked(backend, url_of(backend), storage, key) as lock:
            tasks.start_soon(storage.set_state, key, "first")
            await lock.is_waited_for()
            with statements(storage.table.name) as seen:
                second = asyncio.create_task(storage.set_state(key, "second"))
                await give_way()
                second.cancel()
                with anyio.fail_after(PATIENCE), pytest.raises(asyncio.CancelledError):
                    await second
                lock.release()
                assert [sql for _, sql in seen if "RETURNING" not in sql] == []
    assert await storage.get_state(key) == "first"


@pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if backend.server == "sqlite"], ids=str
)
async def test_a_call_that_is_cancelled_between_two_attempts_makes_no_other(
    backend: Backend,
    open_storage: Open,
    url_of: Callable[[Backend], URL],
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    impatient = {"connect_args": {"timeout": 0}}
    storage: SQLAlchemyStorage = await open_storage(
        backend, engine_options=impatient, retry_for=3600
    )
    await storage.set_state(key, "waiting")
    with locked(backend, url_of(backend), storage, key) as lock:
        task = asyncio.create_task(storage.set_state(key, "written"))
        await until(lambda: "trying again" in caplog.text)
        task.cancel()
        with anyio.fail_after(PATIENCE), pytest.raises(asyncio.CancelledError):
            await task
        lock.release()
        await give_way()
    assert await storage.get_state(key) == "waiting"


# Many


async def test_a_cancellation_at_any_moment_leaves_all_or_nothing(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    options = {"poolclass": NullPool, "connect_args": backend.without_tls}
    storage = await open_storage(backend, engine_options=options)
    for turns in range(30):
        before = await storage.get_data(key)
        change = {f"field {turns}": turns}
        task = asyncio.create_task(storage.update_data(key, change))
        for _ in range(turns):
            await checkpoint()
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(result, (dict, asyncio.CancelledError))
        after = await storage.get_data(key)
        assert after in (before, before | change)
        assert isinstance(result, asyncio.CancelledError) or after == result
        await checkpoint()
        assert await storage.get_data(key) == after


async def test_many_cancellations_leave_the_pool_whole(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    engines: list[Any] = []

    def wrap(engine: Any) -> Any:
        engines.append(engine)
        return backend.factory(engine)

    few = {"pool_size": 3, "max_overflow": 0, "pool_timeout": 1}
    storage = await open_storage(replace(backend, wrap=wrap), engine_options=few)
    chance = random.Random(backend.name)
    calls: list[Call] = [
        lambda: storage.get_data(key),
        lambda: storage.set_state(key, "waiting"),
        lambda: storage.set_state(key, None),
        lambda: storage.update_data(key, {"name": "Ada"}),
        lambda: storage.clear(key),
    ]
    results: list[object] = []
    for _ in range(5):
        tasks = [asyncio.create_task(chance.choice(calls)()) for _ in range(40)]
        for task in chance.sample(tasks, len(tasks)):
            await anyio.sleep(chance.choice([0, 0, 0.0005]))
            task.cancel()
        results += await asyncio.gather(*tasks, return_exceptions=True)
    wrong = [
        result
        for result in results
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError)
    ]
    assert wrong == []
    assert engines[0].pool.checkedout() == 0
    await storage.clear(key)
    await asyncio.gather(*(storage.update_data(key, {f"field {n}": n}) for n in range(20)))
    assert len(await storage.get_data(key)) == 20
