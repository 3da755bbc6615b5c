"""Tells whether a pooler stands between a driver and PostgreSQL, before that can do any harm.

A pooler in transaction mode, such as PgBouncer, sends each transaction to any of its servers. A
statement that a driver has prepared on one of them is missing on another, or, worse, another
process has prepared another statement there by the same name, and that one is executed. Drivers
count their names, so processes use the same ones. PgBouncer since 1.21 renames statements and
prepares them where they are missing; before, a driver has to be told.

psycopg can be told by the storage. asyncpg cannot: its settings are those of ``connect()``. So the
first call on an engine finds out, rather than the first one that meets the wrong server. It
compares the process id that the driver was told, which is the pooler's own invention, with the
server's. For ``runner.py`` and ``transaction.py``.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, PoolProxiedConnection

from .errors import is_misplaced_statement

_PID = "SELECT pg_backend_pid()"
_NAME = (
    "SELECT name FROM pg_prepared_statements WHERE statement LIKE '%{0}%' "
    "ORDER BY prepare_time DESC LIMIT 1"
)
_COUNTED = ("__asyncpg_stmt_", "_pg3_")
"""How the names begin that asyncpg and psycopg give to statements, by numbers."""
_ROUNDS = 3  # in which a pooler has to send two clients to the same servers, to look like none

_TELL_ASYNCPG = (
    "a pooler in transaction mode, such as PgBouncer, stands between asyncpg and the server, and "
    "asyncpg would find the prepared statements of other processes there. Create the engine with "
    'connect_args={"statement_cache_size": 0, "prepared_statement_cache_size": 0, '
    '"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__"}, or let PgBouncer 1.21 or '
    "newer prepare statements itself: max_prepared_statements = 100"
)

_looked_at: WeakSet[Engine] = WeakSet()
_unnamed: WeakSet[Engine] = WeakSet()  # whose statements may not be prepared by counted names
_refused: WeakSet[Engine] = WeakSet()


def connect(engine: Engine) -> Connection:
    """Check out a connection, on which statements are prepared only where they are found again.

    :raises ArgumentError: if asyncpg prepares statements, and a pooler mixes them up
    """
    if engine in _refused:
        raise ArgumentError(_TELL_ASYNCPG)
    try:
        connection = engine.connect()
        try:
            look(connection)
        except BaseException:
            connection.close()
            raise
    except Exception as error:
        note(engine, error)
        raise
    return connection


def look(connection: Connection) -> None:
    """Find out whether a pooler stands before the server, once for each engine.

    :param connection: has not begun a transaction
    :raises ArgumentError: if asyncpg prepares statements, and a pooler mixes them up
    """
    engine, dialect = connection.engine, connection.dialect
    if engine not in _looked_at:
        if dialect.name == "postgresql" and dialect.driver in _DRIVERS:
            _look(engine, connection.connection, *_DRIVERS[dialect.driver])
        _looked_at.add(engine)
    if engine in _unnamed and dialect.driver == "psycopg":
        driver: Any = connection.connection.driver_connection
        driver.prepare_threshold = None


def has_looked_at(engine: Engine) -> bool:
    """Tell whether it has been found out."""
    return engine in _looked_at


def needs_transactions(engine: Engine) -> bool:
    """Tell whether a statement alone may be prepared on one server and executed on another.

    asyncpg prepares a statement first and executes it afterwards: that needs a transaction around.
    """
    return engine in _unnamed and engine.dialect.driver == "asyncpg"


def note(engine: Engine, error: Exception) -> None:
    """Learn from an error that a pooler stands before the server.

    :raises ArgumentError: if asyncpg has not been told of it
    """
    if not is_misplaced_statement(error):
        return
    is_counted = _COUNTED[0] in str(error)
    if is_counted and engine not in _looked_at:  # else the application may have removed it
        _refused.add(engine)
        raise ArgumentError(_TELL_ASYNCPG) from error
    _unnamed.add(engine)


def _look(
    engine: Engine,
    pooled: PoolProxiedConnection,
    pid_of: Callable[[Any], int],
    names: Callable[[PoolProxiedConnection, bool], tuple[bool, bool]],
) -> None:
    try:
        if _scalar(pooled, _PID) == pid_of(pooled.driver_connection):
            return
        is_kept, is_safe = names(pooled, not isinstance(engine.pool, NullPool))
    finally:
        pooled.rollback()
    if is_kept and _changes_servers(engine):
        _unnamed.add(engine)
        if not is_safe:
            _refused.add(engine)
            raise ArgumentError(_TELL_ASYNCPG)


def _names_of_psycopg(pooled: PoolProxiedConnection, _: bool) -> tuple[bool, bool]:
    """Tell whether the server knows statements by the driver's names, and whether that is safe."""
    driver: Any = pooled.driver_connection
    threshold = driver.prepare_threshold
    if threshold is None:  # it has been told
        return False, True
    driver.prepare_threshold = 0
    try:
        name = _scalar(pooled, _NAME.format(uuid.uuid4()))
    finally:
        driver.prepare_threshold = threshold
    return name is not None and name.startswith(_COUNTED), True


def _names_of_asyncpg(pooled: PoolProxiedConnection, keeps: bool) -> tuple[bool, bool]:
    token = str(uuid.uuid4())

    async def name_of_mine(driver: Any) -> object:
        return await (await driver.prepare(_NAME.format(token), name=token)).fetchval()

    adapted: Any = pooled.dbapi_connection
    if adapted.run_async(name_of_mine) != token:
        return False, True
    text = _NAME.format(uuid.uuid4())
    first, second = _scalar(pooled, text), _scalar(pooled, text)
    is_cached = first == second and keeps
    return True, not (is_cached or str(first).startswith(_COUNTED))


def _changes_servers(engine: Engine) -> bool:
    """Tell whether connections do not keep their servers: whether the pooler's mode is another.

    It gives the server that was free last, or first: either way, a connection that asks twice and
    another that asks once meet the same server, or the first one meets two.
    """
    with ExitStack() as stack:
        one, other = (stack.enter_context(_spare(engine)) for _ in range(2))
        known = _server(one), _server(other)
        return known[0] == known[1] or any(
            (_server(one), _server(one), _server(other)) != (known[0], *known)
            for _ in range(_ROUNDS)
        )


@contextmanager
def _spare(engine: Engine) -> Iterator[PoolProxiedConnection]:
    pool = engine.pool.recreate()
    try:
        with closing(pool.connect()) as pooled:
            yield pooled
    finally:
        pool.dispose()


def _server(pooled: PoolProxiedConnection) -> int:
    pid: int = _scalar(pooled, _PID)
    pooled.rollback()
    return pid


def _scalar(pooled: PoolProxiedConnection, statement: str) -> Any:
    cursor: Any = pooled.cursor()
    try:
        cursor.execute(statement)
        row = cursor.fetchone()
    finally:
        cursor.close()
    return row and row[0]


_DRIVERS: dict[str, Any] = {
    "asyncpg": (lambda driver: driver.get_server_pid(), _names_of_asyncpg),
    "psycopg": (lambda driver: driver.info.backend_pid, _names_of_psycopg),
}
