"""Several writing processes, and what came of their work."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, text
from sqlalchemy.pool import NullPool

from .writer import STATE, TWIN, Job, work

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
class Outcome:
    """What the journals say, compared with what the table holds."""

    acknowledged: int = 0
    retried: int = 0
    """Calls that were made again."""
    cut: int = 0
    """Calls that were cancelled before they were done."""
    lost: list[str] = field(default_factory=list)
    """Acknowledged writes that are gone, half there, or were overtaken by older ones."""
    errors: list[str] = field(default_factory=list)
    """Errors that reached a caller."""
    left: list[str] = field(default_factory=list)
    """Connections and threads in use at the end."""
    longest: float = 0.0
    """Seconds that a write took at most, from the call to its acknowledgement."""


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
        self._table = table
        self._members: list[_Member] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            _kill(member)

    def hire(self, url: URL, cancels: bool = False, **options: Any) -> None:
        """Start a process.

        :param url: the database, with the driver
        :param cancels: whether to cancel calls at random moments
        :param options: the engine's options
        """
        name = f"w{len(self._members)}"
        address = url.render_as_string(hide_password=False)
        journal = self._folder / f"{name}.journal"
        journal.touch()
        job = Job(name, address, self._table, journal, cancels, options=options)
        self._members.append(_started(job))

    def kill_one(self) -> None:
        """Kill a process, whatever it is doing, and start another in its place."""
        n = random.randrange(len(self._members))
        job = self._members[n].job
        _kill(self._members[n])
        last = max((event[3] for event in _events(job) if event[0] == "try"), default=0)
        self._members[n] = _started(replace(job, first=last + 1))

    def at_work(self) -> Iterator[None]:
        """Yield for each fault to inject, before and after which everybody writes something."""
        self._work_on()
        end = time.monotonic() + SECONDS
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
        outcome = Outcome()
        for member in self._members:
            member.orders.close()
        for member in self._members:
            member.process.join(_PATIENCE)
            if member.process.exitcode != 0:
                outcome.left.append(f"{member.job.name} ended with {member.process.exitcode}")
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            rows = connection.execute(text(f"SELECT id, state, data FROM {self._table}"))
            table = {row.id: {STATE: row.state, **json.loads(row.data or "{}")} for row in rows}
        for member in self._members:
            _judge(_events(member.job), table, outcome)
        return outcome

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


def _events(job: Job) -> list[Any]:
    return [json.loads(line) for line in job.journal.read_text().splitlines()]


def _acknowledges(journal: Path, since: int) -> bool:
    with journal.open("rb") as file:
        file.seek(since)
        return b'["ack"' in file.read()


def _judge(events: list[Any], table: dict[str, dict[str, Any]], outcome: Outcome) -> None:
    tried: dict[tuple[str, str], int] = {}
    acknowledged: dict[tuple[str, str], int] = {}
    for kind, *facts in events:
        if kind == "try":
            row, name, number = facts
            tried[row, name] = number
        elif kind == "ack":
            row, name, number, seconds = facts
            acknowledged[row, name] = number
            outcome.acknowledged += 1
            outcome.longest = max(outcome.longest, seconds)
        elif kind == "cut":
            outcome.cut += 1
        elif kind == "retry":
            outcome.retried += 1
        elif kind == "error":
            outcome.errors += facts
        elif kind == "end":
            connections, threads = facts
            outcome.left += [f"{connections} connections"] * bool(connections) + threads
        else:
            outcome.lost.append(f"{kind}: {facts}")
    for (row, name), last in tried.items():
        found = table.get(row, {})
        value = int(found.get(name) or 0)
        if not acknowledged.get((row, name), 0) <= value <= last:
            outcome.lost.append(f"{row} {name} is {value}: {acknowledged.get((row, name))}, {last}")
        if name != STATE and value != found.get(TWIN + name, 0):
            outcome.lost.append(f"{row} {name} is {value}, its twin {found.get(TWIN + name)}")
