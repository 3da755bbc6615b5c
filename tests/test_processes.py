"""Several processes on one table, as bots are that run side by side or restart."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
from backends import FORKED, SERVERS, Backend
from conftest import Open, dispose
from process_worker import KEY, main
from sqlalchemy import URL, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine

from hybrid_storage import SQLAlchemyStorage

PROCESSES = 3
FIELDS = 30  # that each of them sets at once
SYNCHRONOUS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}


class Workers:
    """Processes that each set fields of their own in one conversation's data, at once.

    :param commands: the way to each of them
    """

    def __init__(self, commands: list[Connection]) -> None:
        self._commands = commands
        self._await_answers()

    def set_fields(
        self, count: int, storage: SQLAlchemyStorage, backend: Backend, url: URL, *, create: bool
    ) -> list[str]:
        """Let each process set so many fields at once; return the names of them all."""
        fields: list[str] = []
        for number, commands in enumerate(self._commands):
            names = [f"process {number}, field {n}" for n in range(count)]
            fields += names
            command = {
                "backend": backend.name,
                "url": url.render_as_string(hide_password=False),
                "table": storage.table.name,
                "create": create,
                "fields": names,
            }
            commands.send(command)
        self._await_answers()
        return fields

    def _await_answers(self) -> None:
        assert [commands.recv() for commands in self._commands] == [""] * PROCESSES


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Start the processes once."""
    pipes = [FORKED.Pipe() for _ in range(PROCESSES)]
    processes = [FORKED.Process(target=main, args=[theirs]) for _, theirs in pipes]
    for process in processes:
        process.start()
    yield Workers([ours for ours, _ in pipes])
    for ours, _ in pipes:
        ours.send(None)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES


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


async def test_another_process_may_have_created_only_one_of_the_tables(
    backend: Backend, url_of: Callable[[Backend], URL]
) -> None:
    """It did so between our look and our statement, and has yet to create the other."""
    url = url_of(backend)
    engine = backend.engine(url)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    storage.create_isolation()
    other = create_engine(url.set(drivername=SYNCHRONOUS[url.get_backend_name()]))

    def create_first(*arguments: Any) -> None:
        if arguments[2].lstrip().startswith(f"CREATE TABLE {storage.table.name} "):
            storage.table.create(other)

    event.listen(
        engine.sync_engine if isinstance(engine, AsyncEngine) else engine,
        "before_cursor_execute",
        create_first,
    )
    await storage.create_table()
    await storage.check_table()
    await dispose(engine)
    storage.table.metadata.drop_all(other)
    other.dispose()
