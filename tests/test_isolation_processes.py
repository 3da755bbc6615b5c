"""Event isolation between processes: several of them at work on the same keys, and some killed.

By default it is a short run. ``HYBRID_STORAGE_ISOLATION=full`` makes it eight processes of four
tasks with 200 sections each, and prints figures.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

import anyio
import pytest
from backends import FORKED, SERVERS, Backend
from conftest import Open
from isolation_worker import KEYS, Job, count_file, events, work
from sqlalchemy import URL

from hybrid_storage import SQLAlchemyStorage

FULL = os.environ.get("HYBRID_STORAGE_ISOLATION") == "full"
PROCESSES, TASKS, SECTIONS = (8, 4, 200) if FULL else (3, 4, 15)
LEASE = 1.5  # seconds, where processes are killed: others wait for that long
PATIENCE = 600 if FULL else 120  # seconds: whoever never gets in is to fail the test

on_each_server = pytest.mark.parametrize(
    "backends",
    [
        pytest.param(backends, id=server)
        for server in dict.fromkeys(backend.server for backend in SERVERS)
        if (backends := [backend for backend in SERVERS if backend.server == server])
    ],
)


@pytest.fixture
async def jobs(
    backends: list[Backend], open_storage: Open, url_of: Callable[[Backend], URL], tmp_path: Path
) -> AsyncIterator[list[Job]]:
    """Return a job for each process: one storage, and all the backends of its server in turn."""
    storage = await open_storage(backends[0], table_name=f"fsm_{uuid.uuid4().hex}")
    storage.create_isolation()
    await storage.create_table()
    folder = tmp_path / "traces"
    folder.mkdir()
    url, name = url_of(backends[0]), storage.table.name
    yield [
        Job(backends[number % len(backends)], url, name, folder, TASKS, SECTIONS, lease=30.0)
        for number in range(PROCESSES)
    ]
    table = storage.metadata.tables[f"{name}_lock"]
    await storage.run_sync(lambda session: table.drop(session.connection()))


@contextmanager
def started(jobs: list[Job]) -> Generator[list[BaseProcess], None, None]:
    """Start a process for each job; none is left at the end."""
    processes: list[BaseProcess] = []
    try:
        for job in jobs:
            processes.append(FORKED.Process(target=work, args=[job]))
            processes[-1].start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


async def exit_codes(processes: list[BaseProcess], count: int | None = None) -> list[int | None]:
    """Return the processes' exit codes when they have ended, or as many of them as that."""
    with anyio.move_on_after(PATIENCE):
        while True:
            ended = [process for process in processes if process.exitcode is not None]
            if len(ended) >= (count or len(processes)):
                break
            await anyio.sleep(0.02)
    return [process.exitcode for process in processes]


@pytest.fixture
def report(backends: list[Backend], capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that prints figures, in a full run."""

    def report(line: str) -> None:
        if FULL:
            with capfd.disabled():
                sys.stdout.write(f"\n{backends[0].server}: {line}\n")

    return report


@on_each_server
async def test_processes_that_count_up_never_overlap_and_lose_no_count(
    jobs: list[Job], backends: list[Backend], open_storage: Open, report: Callable[[str], None]
) -> None:
    folder, total = jobs[0].folder, PROCESSES * TASKS * SECTIONS

    began = time.monotonic()
    with started(jobs) as processes:
        assert await exit_codes(processes) == [0] * PROCESSES
    seconds = time.monotonic() - began

    assert events(folder, "overlap") == []
    assert events(folder, "takeover") == []
    assert len(events(folder, "section")) == total
    assert sum(int(count_file(folder, key).read_text()) for key in KEYS) == total
    storage: SQLAlchemyStorage = await open_storage(backends[0], table_name=jobs[0].table)
    assert sum([await storage.get_value(key, "count", 0) for key in KEYS]) == total
    warnings = events(folder, "warning")
    assert [message for message in warnings if "is lost" in message] == []
    report(
        f"{PROCESSES} processes x {TASKS} tasks x {SECTIONS} sections on {len(KEYS)} keys: "
        f"{total} sections in {seconds:.1f} s, no overlap, count exact; "
        f"{len(warnings)} statements retried",
    )


@on_each_server
async def test_keys_of_killed_processes_are_free_once_their_leases_have_ended_and_not_before(
    jobs: list[Job], report: Callable[[str], None]
) -> None:
    folder = jobs[0].folder
    jobs = [replace(job, lease=LEASE) for job in jobs]
    mortals = [replace(job, dies_in=random.randint(2, TASKS * SECTIONS // 3)) for job in jobs[1:]]

    began = time.monotonic()
    with started(mortals) as killed:
        await exit_codes(killed, 1)
        with started(jobs[:1]) as survivor:
            assert await exit_codes(survivor) == [0]
        assert await exit_codes(killed) == [-SIGKILL] * len(mortals)
    seconds = time.monotonic() - began

    assert events(folder, "overlap") == []
    takeovers = events(folder, "takeover")
    assert takeovers
    assert max(takeovers) < LEASE + 20
    assert len(events(folder, "section")) >= TASKS * SECTIONS
    assert [each for each in events(folder, "warning") if "is lost" in each] == []
    report(
        f"{len(mortals)} of {len(jobs)} processes killed inside a section, lease {LEASE} s: "
        f"{len(takeovers)} keys taken over, at most {max(takeovers):.2f} s after the lease of "
        f"their last asker; no overlap; {seconds:.1f} s in all",
    )
