"""Makes a write wait at the database for as long as a test wants, and tells when it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from aiogram.fsm.storage.base import KeyBuilder, StorageKey
from backends import SERVERS, Backend
from sqlalchemy import URL, Connection, Engine, event, func, select, text
from sqlalchemy.pool import NullPool, Pool

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage

PATIENCE = 30  # seconds: a test whose condition never comes is to fail, not to hang


class Lock:
    """A conversation's row, locked by an open transaction of a connection of its own.

    ``connection`` is synchronous, whatever the storage's backend is.
    """

    def __init__(self, connection: Connection, storage: SQLAlchemyStorage, row: str) -> None:
        self.connection = connection
        self._table = storage.table
        self._row = row
        self._begun: list[tuple[Engine, str]] = []

    async def is_waited_for(self) -> None:
        """Wait until a statement of the storage has begun and waits for the lock."""
        await until(lambda: bool(self._begun))
        if self.connection.dialect.name == "postgresql":
            waiting = text(
                "SELECT count(*) FROM pg_locks"
                " WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            )
            await until(lambda: bool(self.connection.scalar(waiting)))
        elif self.connection.dialect.name == "mysql":
            # What information_schema tells is old for as long as someone keeps asking.
            status = text("SHOW ENGINE INNODB STATUS")
            waits = re.compile(rf"TO BE GRANTED:\s+RECORD LOCKS .*`{self._table.name}`")
            await until(lambda: bool(waits.search(self.connection.execute(status).one()[2])))
        else:  # it does not tell; but what has begun there can go no further
            await give_way()

    def write(self, **values: str | None) -> None:
        """Change the row in the transaction that holds the lock."""
        update = self._table.update().where(self._table.c.id == self._row)
        assert self.connection.execute(update.values(**values)).rowcount == 1

    def release(self) -> None:
        """Commit, and let the others go on."""
        self.connection.commit()

    def _acquire(self) -> None:
        if self.connection.dialect.name == "sqlite":
            self.connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif self.connection.dialect.name == "postgresql":
            # Should the loop stand still, so that nobody releases the lock: the server does.
            self.connection.exec_driver_sql(
                f"SET idle_in_transaction_session_timeout = '{PATIENCE}s'"
            )
        found = select(func.count()).select_from(
            select(self._table.c.id)
            .where(self._table.c.id == self._row)
            .with_for_update()
            .subquery()
        )
        assert self.connection.scalar(found) == 1, "there is no row to lock"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the row, and take note of what begins from then on."""
        self._acquire()
        with statements(self._table.name) as self._begun:
            yield


@contextmanager
def locked(
    backend: Backend,
    url: URL,
    storage: SQLAlchemyStorage,
    key: StorageKey,
    key_builder: KeyBuilder | None = None,
) -> Iterator[Lock]:
    """Lock the row of a conversation, which must be there, until released or left."""
    row = (key_builder or FullKeyBuilder()).build(key)
    holder = next(each for each in SERVERS if each.server == backend.server and not each.is_async)
    engine: Any = holder.engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        lock = Lock(connection, storage, row)
        with lock.held():
            yield lock


@contextmanager
def statements(*needles: str) -> Iterator[list[tuple[Engine, str]]]:
    """Collect the engines and the texts of the statements that contain the needles."""
    seen: list[tuple[Engine, str]] = []

    def note(connection: Any, cursor: object, statement: str, *_: object) -> None:
        if all(needle in statement for needle in needles):
            seen.append((connection.engine, statement))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    with anyio.fail_after(PATIENCE):
        while True:
            if condition():
                return
            await anyio.sleep(0.005)


async def give_way() -> None:
    """Let other tasks and threads run on, for all that they would do without being waited for."""
    for _ in range(20):
        await anyio.sleep(0.001)


@contextmanager
def sqlite_without_fsync() -> Iterator[None]:
    """Let SQLite's new connections leave it to the system when to write to the disk."""

    def connect(connection: Any, record: Any) -> None:
        if "sqlite" in type(connection).__module__:
            connection.cursor().execute("PRAGMA synchronous = OFF")

    event.listen(Pool, "connect", connect)
    try:
        yield
    finally:
        event.remove(Pool, "connect", connect)


@contextmanager
def listening(engine: Engine, seen: list[tuple[str, Any]]) -> Iterator[None]:
    """Collect the statements of an engine, with their parameters."""

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", note)
