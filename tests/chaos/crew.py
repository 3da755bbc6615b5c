"""Several writing processes, and what came of their work."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool

from .journal import events
from .outcome import Judge, Outcome, Table
from .writer import STATE, Job, work

SECONDS = float(os.environ.get("HYBRID_STORAGE_CHAOS_SECONDS", "3"))
"""How long a scenario injects faults for."""
_PATIENCE = 60  # seconds for what takes one or two

# Processes are forked off one that has imported what takes long, and has no threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "hybrid_storage",
        "sqlalchemy.ext.asyncio",
        *["aiosqlite", "asyncmy", "asyncpg", "psycopg", "pymysql"],
    ]
)


@dataclass
class _Member:
    job: Job
    process: BaseProcess
    orders: Connection
    """Closed to tell the process to stop; so it stops, too, if we are killed."""


class Crew:
    """Writing processes on one table; a context manager, at whose end none is left."""

    def __init__(self, folder: Path, table: str) -> None:
        """Start with nobody.

        :param folder: where to keep the journals
        :param table: the table to write to, which need not be there
        """
        self._folder = folder
        self.table = table
        self._members: list[_Member] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            _kill(member)

    def hire(
        self,
        url: URL,
        cancels: bool = False,
        lease: float | None = None,
        pause: float = 0.0,
        **options: Any,
    ) -> None:
        """Start a process.

        :param url: the database, with the driver
        :param cancels: whether to cancel calls at random moments
        :param lease: whether to handle updates beside, under locks of so many seconds
        :param pause: how many seconds each of its clients waits between two writes
        :param options: the engine's options
        """
        name = f"w{len(self._members)}"
        address = url.render_as_string(hide_password=False)
        journal = self._folder / f"{name}.journal"
        journal.touch()
        job = Job(
            name,
            address,
            self.table,
            journal,
            cancels,
            lease=lease,
            pause=pause,
            options=options,
        )
        self._members.append(_started(job))

    def kill_one(self) -> None:
        """Kill a process, whatever it is doing, and start another in its place."""
        n = random.randrange(len(self._members))
        job = self._members[n].job
        _kill(self._members[n])
        last = max((event[3] for event in events(job.journal) if event[0] == "try"), default=0)
        self._members[n] = _started(replace(job, first=last + 1))

    def at_work(self, seconds: float = SECONDS) -> Iterator[None]:
        """Yield for each fault to inject, before and after which everybody writes something.

        :param seconds: after which there are no more faults; there is always one
        """
        self._work_on()
        end = time.monotonic() + seconds
        while True:
            yield
            self._work_on()
            if time.monotonic() > end:
                return

    def outcome(self, url: URL) -> Outcome:
        """Let the processes finish, and compare.

        :param url: the database, with a synchronous driver
        :return: what came of it
        """
        for member in self._members:
            member.orders.close()
        for member in self._members:
            member.process.join(_PATIENCE)
        judge = Judge(self._held(url))
        for member in self._members:
            judge.read(events(member.job.journal))
        outcome = judge.outcome()
        for member in self._members:
            if member.process.exitcode != 0:
                outcome.left.append(f"{member.job.name} ended with {member.process.exitcode}")
        return outcome

    def _held(self, url: URL) -> Table:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            rows = connection.execute(text(f"SELECT id, state, data FROM {self.table}"))
            return {row.id: {STATE: row.state, **json.loads(row.data or "{}")} for row in rows}

    def _work_on(self) -> None:
        sizes = [member.job.journal.stat().st_size for member in self._members]
        deadline = time.monotonic() + _PATIENCE
        for member, size in zip(self._members, sizes, strict=True):
            while not _acknowledges(member.job.journal, size):
                assert member.process.is_alive(), f"{member.job} has ended"
                assert time.monotonic() < deadline, f"{member.job} does not come on"
                time.sleep(0.05)


def _started(job: Job) -> _Member:
    theirs, ours = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, theirs))
    process.start()
    theirs.close()
    return _Member(job, process, ours)


def _kill(member: _Member) -> None:
    member.process.kill()
    member.process.join()
    member.orders.close()


def _acknowledges(journal: Path, since: int) -> bool:
    with journal.open("rb") as file:
        file.seek(since)
        return b'["ack"' in file.read()
