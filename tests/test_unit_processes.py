"""Units of work between processes: nothing is lost, whoever is killed, stopped or cut off.

By default it is a short run. ``HYBRID_STORAGE_UNIT=full`` makes it eight processes of four tasks,
and prints figures. ``HYBRID_STORAGE_KILLS`` says how often a bot is killed.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from aiogram.fsm.storage.base import StorageKey
from backends import BY_DRIVER, FORKED, MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
from blocking import statements
from bot_api import BOT_ID, USER_ID, BotAPI, serve
from chaos.proxy import Address, Proxy
from conftest import Open, dispose
from sqlalchemy import URL, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from unit_worker import (
    KEYS,
    Job,
    count_up,
    counters,
    handle_updates,
    hold,
    is_serialization_failure,
    poll,
    write_beside,
)

from hybrid_storage import SQLAlchemyEventIsolation, SQLAlchemyStorage

FULL = os.environ.get("HYBRID_STORAGE_UNIT") == "full"
PROCESSES, TASKS, UPDATES = (8, 4, 100) if FULL else (3, 2, 12)
KILLS = int(os.environ.get("HYBRID_STORAGE_KILLS", "4"))
PATIENCE = 600 if FULL else 60  # seconds: whoever never gets in is to fail the test
KEY = KEYS[0]

DRIVERS = {
    # psycopg in threads, and asyncpg in both ways, in turn
    "postgresql": [POSTGRESQL[0], POSTGRESQL[2], BY_DRIVER],
    "mariadb": MARIADB[:1],
    "sqlite": SQLITE,
}
on_each_server = pytest.mark.parametrize(
    "backends",
    [
        pytest.param(backends, id=server)
        for server, backends in DRIVERS.items()
        if backends[0] in SERVERS
    ],
)
over_a_network = pytest.mark.parametrize(
    "backends",
    [
        pytest.param([backend], id=backend.name)
        for server in ("postgresql", "mariadb")
        for backend in DRIVERS[server]
    ],
)
on_each_sync_driver = pytest.mark.parametrize(
    "backends",
    [
        pytest.param([backend], id=backend.name)
        for backend in (SQLITE[0], POSTGRESQL[0], MARIADB[0])
        if backend in SERVERS
    ],
)
on_each_postgresql = pytest.mark.parametrize(
    "backends", [pytest.param([each], id=each.name) for each in DRIVERS["postgresql"]]
)
on_postgresql = pytest.mark.parametrize("backends", [DRIVERS["postgresql"]], ids=["postgresql"])


@dataclass
class Site:
    """The tables that all processes use, and a storage of the test's own on them."""

    job: Job
    backends: list[Backend]
    storage: SQLAlchemyStorage
    isolation: SQLAlchemyEventIsolation
    app: Table
    locks: Table

    def jobs(self, count: int, **options: Any) -> list[Job]:
        """Return a job for each process, with the drivers in turn."""
        drivers = [self.backends[number % len(self.backends)] for number in range(count)]
        return [replace(self.job, backend=driver, **options) for driver in drivers]

    def sync_job(self, **options: Any) -> Job:
        """Return a job for synchronous code."""
        driver = next(each for each in SERVERS if each.server == self.backends[0].server)
        assert not driver.is_async
        return replace(self.job, backend=driver, **options)

    async def counted(self) -> list[int]:
        """Return the numbers in the application's table."""
        select = sa.select(self.app.c.n).order_by(self.app.c.id)
        numbers: list[int] = await self.run(lambda session: list(session.scalars(select)))
        return numbers

    async def data(self) -> list[dict[str, Any]]:
        """Return the data of each conversation."""
        return [await self.storage.get_data(key) for key in KEYS]

    async def held(self) -> list[str]:
        """Return the ids of the locks that somebody holds."""
        select = sa.select(self.locks.c.id).where(self.locks.c.owner != "")
        ids: list[str] = await self.run(lambda session: list(session.scalars(select)))
        return ids

    async def run(self, function: Callable[[Session], Any]) -> Any:
        """Run a function of a session."""
        return await self.storage.run_sync(function)


@pytest.fixture
async def site(
    backends: list[Backend], open_storage: Open, url_of: Callable[[Backend], URL], tmp_path: Path
) -> AsyncIterator[Site]:
    """Return a site with empty tables."""
    storage: SQLAlchemyStorage = await open_storage(backends[0])
    isolation = storage.create_isolation(unit_of_work=True, lease=30.0, poll=0.05)
    await storage.create_table()
    name = storage.table.name
    app, locks = counters(name), storage.metadata.tables[f"{name}_lock"]

    def create(session: Session) -> None:
        app.create(session.connection())
        session.execute(app.insert(), [{"id": key.user_id, "n": 0} for key in KEYS])

    def drop(session: Session) -> None:
        app.drop(session.connection())
        locks.drop(session.connection())

    await storage.run_sync(create)
    folder = tmp_path / "traces"
    folder.mkdir()
    job = Job(backends[0], url_of(backends[0]), name, folder, TASKS, UPDATES)
    yield Site(job, backends, storage, isolation, app, locks)
    await storage.run_sync(drop)


@contextmanager
def started(
    function: Callable[..., None], *arguments: tuple[Any, ...]
) -> Generator[list[BaseProcess], None, None]:
    """Start a process for each tuple of arguments; none is left at the end."""
    processes: list[BaseProcess] = []
    try:
        for each in arguments:
            processes.append(FORKED.Process(target=function, args=each))
            processes[-1].start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


async def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    """Return the processes' exit codes when they have ended."""
    with anyio.move_on_after(PATIENCE):
        await until(lambda: all(process.exitcode is not None for process in processes))
    return [process.exitcode for process in processes]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    with anyio.fail_after(PATIENCE):
        while True:
            if condition():
                return
            await anyio.sleep(0.005)


@pytest.fixture
def report(
    request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], None]:
    """Return a function that prints figures, in a full run."""

    def report(line: str) -> None:
        if FULL or KILLS > 4:
            with capfd.disabled():
                sys.stdout.write(f"\n{request.node.callspec.id}: {line}\n")

    return report


# Several processes


async def count_together(site: Site, report: Callable[[str], None], **options: Any) -> None:
    """Have processes count up while synchronous code writes beside, and check the counts."""
    job, jobs = site.job, site.jobs(PROCESSES, **options)
    total = PROCESSES * TASKS * UPDATES

    began = time.monotonic()
    with started(write_beside, (site.sync_job(**options),)) as writer:
        with started(handle_updates, *((each,) for each in jobs)) as processes:
            assert await exit_codes(processes) == [0] * PROCESSES
        seconds = time.monotonic() - began
        job.say("stop")
        assert await exit_codes(writer) == [0]

    assert job.noted("overlap") == []
    done = [job.noted("done").count(key.user_id) for key in KEYS]
    assert sum(done) == total
    assert await site.counted() == done
    fields = {f"field{number}": number for number in range(len(job.noted("fields")))}
    assert fields
    for data, count in zip(await site.data(), done, strict=True):
        assert (data.pop("count", 0), data.pop("after", 0)) == (count, count)
        assert data == fields
    assert await site.held() == []
    warnings, repeated = job.noted("warning"), job.noted("serialization")
    assert [message for message in warnings if "lost" in message or "could not" in message] == []
    report(
        f"{PROCESSES} processes x {TASKS} tasks x {UPDATES} updates on {len(KEYS)} keys: {total} "
        f"updates in {seconds:.1f} s, no overlap, counts exact, {len(fields)} fields of other "
        f"writers kept in each row; {len(warnings)} statements retried, {len(repeated)} updates "
        "begun anew by the application"
    )


@on_each_server
async def test_processes_count_exactly_while_synchronous_code_writes_other_fields(
    site: Site, report: Callable[[str], None]
) -> None:
    await count_together(site, report)


@on_postgresql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_processes_count_exactly_at_higher_isolation_levels(
    site: Site, report: Callable[[str], None], level: str
) -> None:
    await count_together(site, report, isolation_level=level)


@on_each_server
async def test_what_was_acknowledged_is_there_when_processes_are_killed(
    site: Site, report: Callable[[str], None]
) -> None:
    job, jobs = site.job, site.jobs(PROCESSES, lease=1.0)
    mortals = [replace(each, updates=1_000_000) for each in jobs[1:]]

    killed = 0
    with started(handle_updates, *((each,) for each in jobs[:1])) as survivor:
        for _ in range(5 if FULL else 1):
            with started(handle_updates, *((each,) for each in mortals)) as processes:
                done = len(job.noted("done"))
                await until(lambda done=done: len(job.noted("done")) > done + 10)  # type: ignore[misc]
                await anyio.sleep(random.uniform(0, 0.05))
                for process in processes:
                    process.kill()
                assert await exit_codes(processes) == [-signal.SIGKILL] * len(mortals)
                killed += len(mortals)
        assert await exit_codes(survivor) == [0]

    for number in range(len(KEYS)):  # everybody gets in again
        async with site.isolation.lock(KEYS[number]):
            pass
    assert job.noted("overlap") == []
    done_of = [job.noted("done").count(key.user_id) for key in KEYS]
    counted = await site.counted()
    for data, done, n in zip(await site.data(), done_of, counted, strict=True):
        assert data.get("count", 0) == n  # one transaction
        assert done <= data.get("after", 0) <= n
    assert sum(counted) <= sum(done_of) + killed * TASKS
    assert [each for each in job.noted("warning") if "lost" in each] == []
    report(
        f"{killed} processes of {TASKS} tasks killed: {sum(done_of)} updates acknowledged, "
        f"{sum(counted)} counted in both tables"
    )


@on_each_server
@pytest.mark.parametrize(
    ("ends_by", "is_free_again"),
    [("the end of the lock", True), ("flush", False), ("transaction", True)],
)
async def test_a_process_that_was_stopped_beyond_its_lease_writes_nothing(
    site: Site, ends_by: str, is_free_again: bool
) -> None:
    job = replace(site.job, lease=0.6)
    with started(hold, (job, ends_by)) as (holder,):
        await until(lambda: job.is_said("held"))
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGSTOP)
        async with AsyncExitStack() as stack:
            async with site.isolation.lock(KEY):
                assert await site.storage.get_data(KEY) == {}
                await site.storage.update_data(KEY, {"count": 1, "by": "other"})
            if not is_free_again:
                await stack.enter_async_context(site.isolation.lock(KEY))
            job.say("go on")
            os.kill(holder.pid, signal.SIGCONT)
            assert await exit_codes([holder]) == [0]

    assert job.noted("done") == []
    (message,) = job.noted("lost")
    assert "nothing of what its handler has done is written" in message
    assert await site.storage.get_data(KEY) == {"count": 1, "by": "other"}
    assert await site.storage.get_state(KEY) is None
    assert await site.counted() == [0] * len(KEYS)
    assert await site.held() == []


@on_each_server
async def test_a_process_that_was_stopped_writes_if_nobody_took_over(site: Site) -> None:
    job = replace(site.job, lease=0.5)
    with started(hold, (job, "the end of the lock")) as (holder,):
        await until(lambda: job.is_said("held"))
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGSTOP)
        await anyio.sleep(0.8)
        job.say("go on")
        os.kill(holder.pid, signal.SIGCONT)
        assert await exit_codes([holder]) == [0]

    assert job.noted("done") == [KEY.user_id]
    assert await site.storage.get_data(KEY) == {"count": 1, "by": "holder"}
    assert await site.held() == []


# Connections that are cut


def address(url: URL) -> Address:
    """Return where a server listens."""
    host = str(url.query.get("host") or url.host or "127.0.0.1")
    port = url.port or {"postgresql": 5432, "mysql": 3306}[url.get_backend_name()]
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)


def behind(proxy: Proxy, job: Job) -> Job:
    """Return the same job, which reaches the server through a proxy."""
    return replace(job, url=job.url.set(host="127.0.0.1", port=proxy.port, query={}))


@over_a_network
async def test_updates_whose_answers_are_lost_are_applied_once(
    site: Site, report: Callable[[str], None]
) -> None:
    keys, updates = KEYS[:3], 100 if FULL else 8
    # MariaDB answers several times as often as PostgreSQL for an update.
    share = 0.1 if site.backends[0].server == "postgresql" else 0.03
    done: list[str] = []

    async def handle(
        storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation, name: int
    ) -> None:
        for number in range(updates):
            key, this = random.choice(keys), f"{name}-{number}"
            async with isolation.lock(key):
                seen = await storage.get_value(key, "seen", [])
                await anyio.sleep(random.uniform(0, 0.002))
                await storage.update_data(key, {"seen": [*seen, this]})
            done.append(this)

    with Proxy(address(site.job.url)) as proxy:
        job = behind(proxy, site.job)
        engines = [job.engine() for _ in range(2)]
        with proxy.forgetting(share):
            async with anyio.create_task_group() as group:
                for first, engine in enumerate(engines):
                    storage, isolation = job.storage(engine)
                    for name in range(first, 6, len(engines)):
                        group.start_soon(handle, storage, isolation, name)
        for engine in engines:
            await dispose(engine)

    assert proxy.lost > 0
    assert len(done) == 6 * updates
    seen = [this for data in await site.data() for this in data.get("seen", [])]
    assert sorted(seen) == sorted(done)
    assert await site.held() == []
    report(f"{proxy.lost} answers lost during {len(done)} updates: each was applied once")


@on_each_postgresql
async def test_a_write_that_lands_after_its_connection_was_cut_is_no_lost_lock(site: Site) -> None:
    """It waits for a row; the same write, sent again, waits behind it, and finds the lock free."""
    await site.storage.set_data(KEY, {"count": 0})

    async def handle(storage: SQLAlchemyStorage, isolation: SQLAlchemyEventIsolation) -> None:
        async with isolation.lock(KEY):
            await storage.update_data(KEY, {"count": 1})

    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :lock"
    )
    with Proxy(address(site.job.url)) as proxy:
        engine = behind(proxy, site.job).engine()
        storage, isolation = site.job.storage(engine)
        other: Any = site.sync_job().backend.engine(site.job.url)
        with other.connect() as writer, other.connect() as onlooker:

            async def are_waiting(count: int) -> None:
                with anyio.fail_after(PATIENCE):
                    while onlooker.scalar(waiting, {"lock": f"%{site.locks.name}%"}) < count:
                        onlooker.rollback()
                        await anyio.sleep(0.01)

            writer.execute(sa.select(site.storage.table).with_for_update())
            async with anyio.create_task_group() as group:
                group.start_soon(handle, storage, isolation)
                await are_waiting(1)
                proxy.reset()
                await are_waiting(2)
                writer.rollback()
        other.dispose()
        await dispose(engine)

    assert await site.storage.get_data(KEY) == {"count": 1}
    assert await site.held() == []


# Long transactions


# In SQLite the transaction has locked the file, for renewals too.
@pytest.mark.parametrize(
    "backends",
    [
        pytest.param([backend], id=backend.name)
        for backend in (POSTGRESQL[0], POSTGRESQL[2], *MARIADB[:1])
    ],
)
async def test_a_transaction_of_three_leases_loses_none_of_a_hundred_other_locks(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    storage, lease = site.storage, 1.0
    isolation = storage.create_isolation(unit_of_work=True, lease=lease)
    others = [StorageKey(bot_id=42, chat_id=user, user_id=user) for user in range(100, 200)]
    is_over = anyio.Event()

    async def handle(key: StorageKey, *, task_status: Any) -> None:
        async with isolation.lock(key):
            await storage.update_data(key, {"is": "held"})
            task_status.started()
            await is_over.wait()
            assert isolation.still_held(key)

    with caplog.at_level(logging.WARNING, "hybrid_storage"):
        async with anyio.create_task_group() as group:
            for key in others:
                await group.start(handle, key)
            async with isolation.lock(KEY), storage.transaction():
                await storage.update_data(KEY, {"count": 1})
                await storage.flush()
                await anyio.sleep(3 * lease + 0.2)
            is_over.set()

    assert caplog.messages == []
    assert await storage.get_data(KEY) == {"count": 1}
    assert [await storage.get_data(key) for key in others] == [{"is": "held"}] * len(others)
    await isolation.close()  # a renewal may have had the lock's row when it was to be freed
    assert await site.held() == []


# Messages and states


@on_each_postgresql
@pytest.mark.parametrize("flushes", [True, False], ids=["flushes", "does not flush"])
async def test_a_message_is_never_ahead_of_the_state_of_a_bot_that_flushes_and_was_killed(
    site: Site, report: Callable[[str], None], flushes: bool
) -> None:
    """Without flushing, the state is never off by more than the update that was killed."""
    # The next bot has to wait for the lease of the one that was killed.
    job = replace(site.job, lease=None if site.backends[0].is_async else 0.5)
    key = StorageKey(bot_id=BOT_ID, chat_id=USER_ID, user_id=USER_ID)
    kills = (KILLS + 1) // 2
    received = 0
    off: list[int] = []

    async def chat(api: BotAPI) -> None:
        while True:
            await api.confirmed()
            for _ in range(20):
                await api.send("count")

    async def listen(api: BotAPI, seconds: float) -> None:
        nonlocal received
        with anyio.move_on_after(seconds):
            while True:
                received = int(await api.reply())

    async with serve() as api, anyio.create_task_group() as group:
        group.start_soon(chat, api)
        for _ in range(kills):
            with started(poll, (job, api.url, flushes)) as (bot,):
                with anyio.fail_after(PATIENCE):
                    received = int(await api.reply())
                await listen(api, random.uniform(0, 0.1))
                bot.kill()
                assert await exit_codes([bot]) == [-signal.SIGKILL]
            await listen(api, 0.02)  # to what it has sent before
            number = await site.storage.get_value(key, "count", 0)
            state = await site.storage.get_state(key)
            assert state == (f"counted {number}" if number else None)
            off.append(number - received)
        group.cancel_scope.cancel()

    assert set(off) <= ({0, 1} if flushes else {-1, 0, 1})
    report(
        f"{kills} kills after {received} messages: states behind the message {off.count(-1)}, "
        f"the message's own {off.count(0)}, one ahead {off.count(1)}"
    )


# Old locks


@on_each_server
async def test_old_free_locks_vanish_in_batches_a_minute_after_the_last_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, now = 10_000, time.time()
    columns = site.locks.c
    more = sa.select(
        sa.bindparam("name", type_=sa.String) + columns.id,
        columns.owner,
        columns.expires,
        columns.version,
    ).where(columns.id.startswith("old"))
    first = [(f"old{number}", "", now - 4000) for number in range(1000)]
    others = [("recent", "", now - 60), ("held", "somebody", now + 60)]

    def fill(session: Session) -> None:
        names = ["id", "owner", "expires", "version"]
        rows = [dict(zip(names, (*each, 2), strict=True)) for each in first + others]
        session.execute(site.locks.insert(), rows)
        for number in range(1, count // len(first)):
            session.execute(site.locks.insert().from_select(names, more), {"name": f"{number}:"})

    async def left() -> set[str]:
        select = sa.select(site.locks.c.id)
        return set(await site.run(lambda session: list(session.scalars(select))))

    await site.run(fill)
    async with site.isolation.lock(KEY):
        pass
    assert len(await left()) == count + 3
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 61)
    with statements("DELETE", site.locks.name) as deletions:
        async with site.isolation.lock(KEY):
            pass
        with anyio.fail_after(PATIENCE):
            while True:
                ids = await left()
                if len(ids) <= 3:
                    break
                await anyio.sleep(0.05)

    assert ids >= {"recent", "held"}
    assert len(deletions) == count / 1000


# Synchronous code


@on_each_sync_driver
async def test_threads_and_handlers_count_exactly(site: Site) -> None:
    job, updates = site.job, 10
    engine = job.engine()
    storage, isolation = job.storage(engine)  # as in another process

    def count_in_thread(key: StorageKey) -> None:
        for _ in range(updates):
            with isolation.lock_sync(key), Session(engine) as session, session.begin():
                count = storage.operations.get_value(session, key, "count", 0)
                time.sleep(random.uniform(0, 0.002))
                storage.operations.update_data(session, key, {"count": count + 1})
                count_up(session, site.app, key)

    async def count_in_handler(key: StorageKey) -> None:
        for _ in range(updates):
            async with site.isolation.lock(key):
                count = await site.storage.get_value(key, "count", 0)
                async with site.storage.transaction():
                    await site.storage.run_sync(count_up, site.app, key)
                await site.storage.update_data(key, {"count": count + 1})

    async with anyio.create_task_group() as group:
        for key in KEYS[:2]:
            for _ in range(2):
                group.start_soon(anyio.to_thread.run_sync, count_in_thread, key)
                group.start_soon(count_in_handler, key)
    await dispose(engine)

    assert await site.counted() == [4 * updates] * 2 + [0] * 3
    assert [data.get("count", 0) for data in await site.data()] == await site.counted()
    assert await site.held() == []


@on_each_sync_driver
async def test_synchronous_code_keeps_its_lock_beyond_the_lease(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    isolation = site.storage.create_isolation(lease=0.5, poll=0.05)
    impatient = site.storage.create_isolation(lease=0.5, poll=0.05, wait=1.0)
    too_long = r"could not acquire the lock for '.*' within 1 s: its holder is still at work"
    is_held = anyio.Event()

    def hold_for_long() -> None:
        with isolation.lock_sync(KEY):
            anyio.from_thread.run_sync(is_held.set)
            time.sleep(1.7)

    def enter() -> None:
        with impatient.lock_sync(KEY):
            pass

    async def wait_in_handler() -> None:
        with pytest.raises(TimeoutError, match=too_long):
            async with impatient.lock(KEY):
                pass

    async def wait_in_thread() -> None:
        with pytest.raises(TimeoutError, match=too_long):
            await anyio.to_thread.run_sync(enter)

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, hold_for_long)
        await is_held.wait()
        group.start_soon(wait_in_handler)
        group.start_soon(wait_in_thread)
    await anyio.to_thread.run_sync(enter)
    assert caplog.messages == []
    assert await site.held() == []


@on_each_sync_driver
async def test_synchronous_code_waits_for_handlers(site: Site) -> None:
    order: list[str] = []
    is_held, is_asked = anyio.Event(), anyio.Event()

    def ask() -> None:
        anyio.from_thread.run(is_held.wait)
        anyio.from_thread.run_sync(is_asked.set)
        with site.isolation.lock_sync(KEY):
            order.append("thread")

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, ask)
        async with site.isolation.lock(KEY):
            is_held.set()
            await is_asked.wait()
            await anyio.sleep(0.3)
            order.append("handler")
    assert order == ["handler", "thread"]


@on_each_sync_driver
async def test_a_thread_that_asks_for_a_lock_that_it_holds_gets_an_error(site: Site) -> None:
    def ask_twice() -> None:
        with site.isolation.lock_sync(KEY), site.isolation.lock_sync(KEYS[1]):
            message = "this thread holds the lock of '.*' already"
            with (
                pytest.raises(RuntimeError, match=message),
                site.isolation.lock_sync(replace(KEY, destiny="other")),
            ):
                pass
        with site.isolation.lock_sync(KEY):  # it was not freed twice
            pass

    await anyio.to_thread.run_sync(ask_twice)
    assert await site.held() == []


@on_each_sync_driver
async def test_an_exception_in_synchronous_code_frees_the_lock(site: Site) -> None:
    def fail() -> None:
        with site.isolation.lock_sync(KEY):
            raise LookupError

    with pytest.raises(LookupError):
        await anyio.to_thread.run_sync(fail)
    assert await site.held() == []


@on_each_sync_driver
async def test_synchronous_code_needs_a_lease(site: Site) -> None:
    isolation = site.storage.create_isolation(lease=None)
    with pytest.raises(RuntimeError, match=r"lock_sync\(\) needs a lease"):
        isolation.lock_sync(KEY)


@pytest.mark.parametrize("backends", [[POSTGRESQL[2]], [SQLITE[1]]], ids=["asyncpg", "aiosqlite"])
async def test_synchronous_code_needs_synchronous_sessions(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def lock() -> None:
        with site.isolation.lock_sync(KEY):
            pass

    with pytest.raises(TypeError, match="needs a storage with a synchronous sessionmaker"):
        await anyio.to_thread.run_sync(lock)
    assert caplog.messages == []


# Isolation levels


@on_each_postgresql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_serialization_failure_inside_a_transaction_is_raised_to_the_application(
    site: Site, level: str
) -> None:
    engine = replace(site.job, isolation_level=level).engine()
    storage, isolation = site.job.storage(engine)
    await storage.set_data(KEY, {"count": 0})

    with pytest.raises(DBAPIError) as caught:
        async with isolation.lock(KEY):
            assert await storage.get_data(KEY) == {"count": 0}
            async with storage.transaction():
                await storage.run_sync(lambda session: session.execute(sa.select(site.app)).all())
                await site.storage.set_data(KEY, {"other": 1})  # of another, after the snapshot
                await storage.update_data(KEY, {"count": 2})
    assert is_serialization_failure(caught.value)
    await dispose(engine)
    assert await site.storage.get_data(KEY) == {"other": 1}
    assert await site.held() == []


@on_each_postgresql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_at_higher_isolation_levels_a_unit_keeps_what_others_have_written(
    site: Site, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = replace(site.job, isolation_level=level).engine()
    storage, isolation = site.job.storage(engine)
    await storage.set_data(KEY, {"count": 0})

    async with isolation.lock(KEY):
        await storage.update_data(KEY, {"count": 1})
        await site.storage.update_data(KEY, {"other": 1})
    await dispose(engine)
    assert await site.storage.get_data(KEY) == {"count": 1, "other": 1}
    assert caplog.messages == []
