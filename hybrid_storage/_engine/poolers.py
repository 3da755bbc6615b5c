"""Tells whether a pooler stands between a driver and PostgreSQL, before that can do any harm.

A pooler in transaction mode, such as PgBouncer, sends each transaction to any of its servers. A
statement that a driver has prepared on one of them is missing on another, or, worse, another
process has prepared another statement there by the same name, and that one is executed. Drivers
count their names, so processes use the same ones. PgBouncer since 1.21 renames statements and
prepares them where they are missing; before, a driver has to be told.

So the first call on an engine compares the process id that the driver was told, which is a pooler's
own invention, with the server's. Behind a pooler, psycopg is told not to prepare, which is safe in
any mode. asyncpg cannot be told, its settings are those of ``connect()``: where it would do harm,
it is refused. For ``runner.py`` and ``transaction.py``.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool, PoolProxiedConnection

from .errors import is_misplaced_statement, is_transient

_PID = "SELECT pg_backend_pid()"
_NAME = (
    "SELECT name FROM pg_prepared_statements WHERE statement LIKE '%{0}%' "
    "ORDER BY prepare_time DESC LIMIT 1"
)
_COUNTED = "__asyncpg_stmt_"  # how the names begin that asyncpg gives to statements, by numbers
_ROUNDS = 3  # in which a pooler has to send two clients to the same servers, to look like none
_PATIENCE = 3.0  # seconds for two more clients to get servers

_TELL_ASYNCPG = (
    "a pooler in transaction mode, such as PgBouncer, stands between asyncpg and the server, and "
    "asyncpg would find the prepared statements of other processes there. Create the engine with "
    'connect_args={"statement_cache_size": 0, "prepared_statement_cache_size": 0, '
    '"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__"}, or let PgBouncer 1.21 or '
    "newer prepare statements itself: max_prepared_statements = 100"
)

# By dialects: an engine has one of its own, and shares it with those of its execution_options().
_looked_at: WeakSet[Dialect] = WeakSet()
_unnamed: WeakSet[Dialect] = WeakSet()  # whose statements may not be prepared by counted names
_refused: WeakSet[Dialect] = WeakSet()


def connect(engine: Engine) -> Connection:
    """Check out a connection, on which statements are prepared only where they are found again.

    :raises ArgumentError: if asyncpg prepares statements, and a pooler mixes them up
    """
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

    A transaction that has begun goes on.

    :raises ArgumentError: if asyncpg prepares statements, and a pooler mixes them up
    """
    dialect = connection.dialect
    if dialect.name != "postgresql" or dialect.driver not in _DRIVERS:
        return
    if dialect not in _looked_at:
        _look(connection)
        _looked_at.add(dialect)
    if dialect in _refused:
        raise ArgumentError(_TELL_ASYNCPG)
    if dialect in _unnamed and dialect.driver == "psycopg":
        driver: Any = connection.connection.driver_connection
        driver.prepare_threshold = None


def needs_transactions(engine: Engine) -> bool:
    """Tell whether a statement alone may be prepared on one server and executed on another.

    asyncpg prepares a statement first and executes it afterwards: that needs a transaction around.
    """
    return engine.dialect in _unnamed and engine.dialect.driver == "asyncpg"


def note(engine: Engine, error: Exception) -> None:
    """Learn from an error that a pooler stands before the server.

    :raises ArgumentError: if asyncpg has not been told of it
    """
    if not is_misplaced_statement(error):
        return
    dialect = engine.dialect
    if _COUNTED in str(error) and dialect not in _looked_at:  # else the application removed it
        _refused.add(dialect)
        _looked_at.add(dialect)
        raise ArgumentError(_TELL_ASYNCPG) from error
    _unnamed.add(dialect)


def _look(connection: Connection) -> None:
    dialect, pooled = connection.dialect, connection.connection
    told_pid, is_in_transaction = _DRIVERS[dialect.driver]
    has_begun = connection.in_transaction()
    is_idle = not (has_begun or is_in_transaction(pooled.driver_connection))
    # What a listener of the pool's has begun, SQLAlchemy does not know, and is not to end.
    asking = connection if has_begun or is_idle else Connection(connection.engine, pooled)
    try:
        pid = asking.exec_driver_sql(_PID).scalar()
        if pid == told_pid(pooled.driver_connection):
            return
        if dialect.driver == "psycopg":
            _unnamed.add(dialect)
            return
        is_kept, is_safe = _names(asking)
    except DBAPIError as error:
        if is_transient(error):
            raise
        return  # no PostgreSQL, but what speaks its protocol
    finally:
        if is_idle:
            connection.rollback()
    if is_kept and _changes_servers(connection.engine):
        (_unnamed if is_safe else _refused).add(dialect)


def _names(connection: Connection) -> tuple[bool, bool]:
    """Tell whether the server knows statements by asyncpg's names, and whether that is safe."""
    token = str(uuid.uuid4())

    async def name_of_mine(driver: Any) -> object:
        return await (await driver.prepare(_NAME.format(token), name=token)).fetchval()

    adapted: Any = connection.connection.dbapi_connection
    if adapted.run_async(name_of_mine) != token:
        return False, True
    text = _NAME.format(uuid.uuid4())
    first, second = (connection.exec_driver_sql(text).scalar() for _ in range(2))
    is_cached = first == second and not isinstance(connection.engine.pool, NullPool)
    return True, not (is_cached or str(first).startswith(_COUNTED))


def _changes_servers(engine: Engine) -> bool:
    """Tell whether connections do not keep their servers: whether the pooler's mode is another.

    It gives the server that was free last, or first: either way, a connection that asks twice and
    another that asks once meet the same server, or the first one meets two.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + _PATIENCE
    try:
        with ExitStack() as stack:
            one, other = (stack.enter_context(_spare(engine, ends)) for _ in range(2))
            known = _server(one), _server(other)
            return known[0] == known[1] or any(
                (_server(one), _server(one), _server(other)) != (known[0], *known)
                for _ in range(_ROUNDS)
            )
    except Exception:
        if loop.time() < ends:
            raise
        return False  # no server came free: others keep them


@contextmanager
def _spare(engine: Engine, ends: float) -> Iterator[PoolProxiedConnection]:
    pool = engine.pool.recreate()
    try:
        with closing(pool.connect()) as pooled:
            driver: Any = pooled.driver_connection
            timer = asyncio.get_running_loop().call_at(ends, driver.terminate)
            try:
                yield pooled
            except BaseException:
                pooled.invalidate()  # to close it politely would wait for the answer
                raise
            finally:
                timer.cancel()
    finally:
        pool.dispose()


def _server(pooled: PoolProxiedConnection) -> Any:
    cursor: Any = pooled.cursor()
    try:
        cursor.execute(_PID)
        return cursor.fetchone()
    finally:
        cursor.close()
        pooled.rollback()


_DRIVERS: dict[str, tuple[Callable[[Any], int], Callable[[Any], bool]]] = {
    "asyncpg": (
        lambda driver: driver.get_server_pid(),
        lambda driver: driver.is_in_transaction(),
    ),
    "psycopg": (
        lambda driver: driver.info.backend_pid,
        lambda driver: bool(driver.info.transaction_status),
    ),
}
"""What a driver was told the server's process id is, and whether a transaction has begun."""
