"""Several processes on one table, as bots are that run side by side or restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from backends import SERVERS, Backend
from conftest import Open
from process_worker import KEY
from sqlalchemy import URL

from hybrid_storage import SQLAlchemyStorage

WORKER = Path(__file__).with_name("process_worker.py")
PROCESSES = 3
FIELDS = 30  # that each of them sets at once


class Workers:
    """Processes that each set fields of their own in one conversation's data, at once."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._await_answers()

    def set_fields(
        self, count: int, storage: SQLAlchemyStorage, backend: Backend, url: URL, *, create: bool
    ) -> list[str]:
        """Let each process set so many fields at once; return the names of them all."""
        fields: list[str] = []
        for number, process in enumerate(self._processes):
            names = [f"process {number}, field {n}" for n in range(count)]
            fields += names
            command = {
                "backend": backend.name,
                "url": url.render_as_string(hide_password=False),
                "table": storage.table.name,
                "create": create,
                "fields": names,
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        self._await_answers()
        return fields

    def _await_answers(self) -> None:
        answers = [process.stdout.readline() for process in self._processes if process.stdout]
        assert answers == ["\n"] * PROCESSES


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Start the processes once: that is what takes its time."""
    command = [sys.executable, "-W", "error", str(WORKER)]
    # They import what this process imports.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(PROCESSES)
        ]
        yield Workers(processes)
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
    assert [process.returncode for process in processes] == [0] * PROCESSES


@pytest.fixture(params=SERVERS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return one backend for each driver."""
    assert isinstance(request.param, Backend)
    return request.param


async def test_no_update_of_several_processes_is_lost(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], workers: Workers
) -> None:
    storage = await open_storage(backend)
    fields = workers.set_fields(FIELDS, storage, backend, url_of(backend), create=False)
    assert len(fields) == PROCESSES * FIELDS
    assert sorted(await storage.get_data(KEY)) == sorted(fields)


async def test_several_processes_may_create_the_table_at_once(
    backend: Backend, open_storage: Open, url_of: Callable[[Backend], URL], workers: Workers
) -> None:
    storage = await open_storage(backend)
    for _ in range(5):
        await storage.run_sync(lambda session: storage.table.drop(session.connection()))
        fields = workers.set_fields(1, storage, backend, url_of(backend), create=True)
        assert sorted(await storage.get_data(KEY)) == sorted(fields)
