"""What an error of the database means, whichever driver raised it.

Drivers disagree: where it cannot connect, asyncpg lets ``OSError`` through and psycopg has no
SQLSTATE; MySQL's drivers have error numbers, SQLite has messages. So the answer goes by SQLSTATE
where there is one, and by what SQLAlchemy knows of the connection.
"""

from __future__ import annotations

import asyncio
import re

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

_MISSING_TABLE = {"42P01", "42703", "42S02", "42S22"}
_MISSING_IN_SQLITE = re.compile(r"no such (table|column)|table .* has no column")

_LOST_STATEMENT = "26000"  # behind a pooler: it was prepared on another server

_TRANSIENT_CLASSES = {
    "08",  # connection exceptions
    "40",  # transaction rollback: serialization failures, deadlocks
    "53",  # insufficient resources: too many connections
}
_TRANSIENT = {
    "55P03",  # lock_timeout
    "57P01",  # the server, or this connection, is shut down
    "57P02",  # the server crashed
    "57P03",  # the server starts up
    _LOST_STATEMENT,
    "25006",  # the server turned read-only, as the old primary does in a failover
}
_TRANSIENT_IN_MYSQL = {
    1020,  # the record has changed since it was read
    1040,  # too many connections
    1053,  # the server shuts down
    1203,  # too many connections of this user
    1205,  # lock wait timeout
    1213,  # deadlock
    1226,  # too much of what this user may have: connections, or statements an hour
    1290,  # the server turned read-only, as the old primary does in a failover
    1927,  # the connection was killed
}
_BUSY_IN_SQLITE = re.compile(r"database (table |schema )?is locked")
_REFUSED = re.compile(  # by a server that answers: psycopg has no SQLSTATE while it connects
    r"authentication failed|does not exist|pg_hba\.conf|no password supplied|permission denied"
)


def is_missing_table(error: DBAPIError) -> bool:
    """Tell whether a statement failed because its table, or a column of it, is not there.

    :param error: the error, as SQLAlchemy wraps it
    """
    return _sqlstate(error) in _MISSING_TABLE or (
        bool(_MISSING_IN_SQLITE.match(str(error.orig))) if _is_sqlite(error) else False
    )


def is_lost_statement(error: DBAPIError) -> bool:
    """Tell whether a pooler sent a prepared statement to a server that has not prepared it.

    :param error: the error, as SQLAlchemy wraps it
    """
    return _sqlstate(error) == _LOST_STATEMENT


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later.

    It may after a dropped connection, while a server restarts, after a deadlock, a serialization
    failure or a lock timeout, and where SQLite or a pool is busy. It may not where the statement,
    the data or the permissions are wrong.

    :param error: what the call raised
    """
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or _is_transient_answer(error)
    # What asyncpg raises while it connects is not wrapped.
    return isinstance(
        error, (OSError, asyncio.TimeoutError, PoolTimeoutError)
    ) or _is_transient_state(_sqlstate(error))


def _is_transient_answer(error: DBAPIError) -> bool:
    if _is_sqlite(error):
        return bool(_BUSY_IN_SQLITE.match(str(error.orig)))
    number = error.orig.args[0] if error.orig is not None and error.orig.args else None
    if number in _TRANSIENT_IN_MYSQL:
        return True
    state = _sqlstate(error)
    if state is not None:
        return _is_transient_state(state)
    # No statement, no SQLSTATE: it could not connect.
    connecting = error.statement is None and isinstance(error, (OperationalError, InterfaceError))
    return connecting and not _REFUSED.search(str(error.orig))


def _is_transient_state(state: str | None) -> bool:
    return state is not None and (state in _TRANSIENT or state[:2] in _TRANSIENT_CLASSES)


def _sqlstate(error: BaseException) -> str | None:
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    return state if isinstance(state, str) else None


def _is_sqlite(error: DBAPIError) -> bool:
    return type(error.orig).__module__.startswith("sqlite3")
