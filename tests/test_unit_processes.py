"""Units of work between processes: nothing is lost, whoever is killed, stopped or cut off.

By default it is a short run. ``HYBRID_STORAGE_UNIT=full`` makes it eight processes of four tasks,
and prints figures. ``HYBRID_STORAGE_KILLS`` says how often a bot is killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
import uuid
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
from backends import MARIADB, POSTGRESQL, SERVERS, SQLITE, Backend
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

from hybrid_storage import LockLostError, SQLAlchemyEventIsolation, SQLAlchemyStorage

FULL = os.environ.get("HYBRID_STORAGE_UNIT") == "full"
PROCESSES, TASKS, UPDATES = (8, 4, 100) if FULL else (3, 2, 20)
KILLS = int(os.environ.get("HYBRID_STORAGE_KILLS", "10"))
PATIENCE = 600 if FULL else 60  # seconds: whoever never gets in is to fail the test
KEY = KEYS[0]

# Processes are forked from one that has imported what takes long, and has no threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["hybrid_storage", "sqlalchemy.ext.asyncio", "asyncpg", "aiosqlite", "aiogram", "psycopg"]
)

DRIVERS = {
    "postgresql": [POSTGRESQL[0], POSTGRESQL[2]],  # psycopg in threads and asyncpg, in turn
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
on_each_driver = pytest.mark.parametrize(
    "backends",
    [
        pytest.param([backend], id=backend.name)
        for backends in DRIVERS.values()
        for backend in backends
        if backend in SERVERS
    ],
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
            processes.append(context.Process(target=function, args=each))
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
        while any(process.exitcode is None for process in processes):
            await anyio.sleep(0.02)
    return [process.exitcode for process in processes]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.005)


@pytest.fixture
def report(
    request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], None]:
    """Return a function that prints figures, in a full run."""

    def report(line: str) -> None:
        if FULL or KILLS > 10:
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


@on_each_driver
@pytest.mark.parametrize("ends_by", ["the end of the lock", "flush", "transaction"])
@pytest.mark.parametrize("is_free_again", [True, False], ids=["freed", "held"])
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
