"""What an error of the database means, whichever driver raised it.

The one table of codes. PostgreSQL's drivers carry an SQLSTATE, MySQL's an error number, SQLite's a
message. An attempt to connect is told by less: asyncpg lets ``OSError`` through, and psycopg has
no SQLSTATE for what the server answered, in whatever language the server speaks.
"""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any, TypeAlias

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

_Codes: TypeAlias = frozenset[str | int | None]

_MISSING_TABLE: _Codes = frozenset({"42P01", "42S02", 1146})
_MISSING_COLUMN: _Codes = frozenset({"42703", "42S22", 1054})
_MISSING_TABLE_IN_SQLITE = re.compile(r"no such table")
_MISSING_COLUMN_IN_SQLITE = re.compile(r"no such column|table .* has no column")

_LOCK_TIMEOUT: _Codes = frozenset({"55P03", 1205})
_NO_SAVEPOINT: _Codes = frozenset({"3B001", "25P01", 1305})  # 1305: also for a function
_NO_SAVEPOINT_IN_SQLITE = re.compile(r"no such savepoint")

# The server turned read-only, as the old primary does in a failover.
_READ_ONLY: _Codes = frozenset({"25006", 1290, 1836})
_NO_PRIMARY = "TargetServerAttributeNotMatched"  # asyncpg's, of target_session_attrs

# A pooler sent the statement to a server that has not prepared it, or that has already.
_MISPLACED_STATEMENT = {"26000", "42P05"}

_TRANSIENT_CLASSES = {
    "08",  # connection exceptions
    "40",  # transaction rollback: serialization failures, deadlocks
    "53",  # insufficient resources: too many connections
}
_TRANSIENT_STATES = {
    *_MISPLACED_STATEMENT,
    "25006",  # the server turned read-only, as the old primary does in a failover
    "55P03",  # lock_timeout
    "57P01",  # the server, or this connection, is shut down
    "57P02",  # the server crashed
    "57P03",  # the server starts up
}
_TRANSIENT_IN_MYSQL = {
    1020,  # the record has changed since it was read
    1040,  # too many connections
    1047,  # Galera: this node is not ready, or not part of the cluster
    1053,  # the server shuts down
    1203,  # too many connections of this user
    1205,  # lock wait timeout
    1213,  # deadlock
    1226,  # too much of what this user may have: connections, or statements an hour
    1290,  # the server turned read-only, as the old primary does in a failover
    1836,  # the same, by innodb_read_only
    1927,  # the connection was killed
    3101,  # group replication rolled the transaction back
    8002,  # TiDB: a conflict with another transaction's SELECT FOR UPDATE
    8005,  # TiDB: a write conflict
    9007,  # TiDB: a write conflict
}
_VITESS = 1105  # whatever went wrong; the text tells
_TRANSIENT_IN_VITESS = re.compile(
    r"primary is not serving|not serving|failing over|vttablet|connection pool|code = Unavailable",
    re.IGNORECASE,
)
_CLIENT_ERRORS_OF_MYSQL = range(2000, 3000)  # the server could not be reached, or went away
_SQLSTATE = re.compile(r"[0-9A-Z]{5}")
_BUSY_IN_SQLITE = re.compile(r"database (table |schema )?is locked")

# Of psycopg, while it connects. The first two are its own words and libpq's, always in English;
# the last is the server's, in English.
_UNKNOWN_HOST = re.compile(
    r"failed to resolve host|could not translate host name|Name or service not known"
    r"|getaddrinfo failed|nodename nor servname"
)
_TRY_AGAIN = re.compile(r"Temporary failure in name resolution|\[Errno -3\]")
_REFUSED = re.compile(
    r"authentication failed|does not exist|pg_hba\.conf|no password supplied|permission denied"
)
_NOT_YET = re.compile(
    r"starting up|shutting down|recovery|not yet accepting|too many|slots are reserved"
)
_OF_THE_SERVER = ":  "  # libpq writes two blanks after the severity, in every language


def is_missing_table(error: BaseException) -> bool:
    """Tell whether a statement failed because its table is not there."""
    return isinstance(error, DBAPIError) and _is_about(
        error, _MISSING_TABLE, _MISSING_TABLE_IN_SQLITE
    )


def is_missing_column(error: DBAPIError) -> bool:
    """Tell whether a statement failed because a column of its table is not there."""
    return _is_about(error, _MISSING_COLUMN, _MISSING_COLUMN_IN_SQLITE)


def is_misplaced_statement(error: BaseException) -> bool:
    """Tell whether a pooler sent a prepared statement to another server than it was prepared on."""
    return _sqlstate(error) in _MISPLACED_STATEMENT


def is_read_only(error: BaseException) -> bool:
    """Tell whether the server takes no writes: a connection to it is of no use any more."""
    return isinstance(error, DBAPIError) and (
        _sqlstate(error) in _READ_ONLY or _number(error) in _READ_ONLY
    )


def is_lock_timeout(error: DBAPIError) -> bool:
    """Tell whether a statement has waited for a lock for as long as it may."""
    return _is_about(error, _LOCK_TIMEOUT, _BUSY_IN_SQLITE)


def is_serialization_failure(error: DBAPIError) -> bool:
    """Tell whether the isolation level wants the transaction to be done once more."""
    return _sqlstate(error) == "40001"


def is_missing_savepoint(error: DBAPIError) -> bool:
    """Tell whether a savepoint has gone, so that the transaction around it has ended."""
    return "SAVEPOINT" in (error.statement or "") and _is_about(
        error, _NO_SAVEPOINT, _NO_SAVEPOINT_IN_SQLITE
    )


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later.

    It may after a dropped connection, while a server restarts, after a deadlock, a serialization
    failure or a lock timeout, and where SQLite or a pool is busy. It may not where the statement,
    the data, the permissions, the password or the host's name are wrong.
    """
    if _has_unknown_host(error):
        return False
    if _is_without_primary(error):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or _is_transient_answer(error)
    # What asyncpg raises while it connects is not wrapped.
    return isinstance(
        error, (OSError, asyncio.TimeoutError, PoolTimeoutError)
    ) or _is_transient_state(_sqlstate(error))


def in_short(error: BaseException) -> str:
    """Return an error's first line for the log, without the statement and its parameters."""
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {cause}".split("\n")[0]


def _is_transient_answer(error: DBAPIError) -> bool:
    if _is_sqlite(error):
        return bool(_BUSY_IN_SQLITE.match(str(error.orig)))
    number = _number(error)
    if number == _VITESS:
        return bool(_TRANSIENT_IN_VITESS.search(str(error.orig)))
    if number is not None:
        return number in _TRANSIENT_IN_MYSQL or number in _CLIENT_ERRORS_OF_MYSQL
    state = _sqlstate(error)
    if state is not None:
        return _is_transient_state(state)
    # Without a statement and an SQLSTATE, it could not connect.
    if error.statement is not None or not isinstance(error, OperationalError):
        return False
    return _may_connect_later(error.orig)


def _may_connect_later(error: Any) -> bool:
    text = str(error)
    if _OF_THE_SERVER in text and _NOT_YET.search(text):
        return True
    if _REFUSED.search(text):
        return False
    # In another language: a server that starts up says so before it asks for a password.
    connection = getattr(error, "pgconn", None)
    asked = bool(
        getattr(connection, "used_password", False) or getattr(connection, "needs_password", False)
    )
    return not (asked and _OF_THE_SERVER in text)


def _is_transient_state(state: str | None) -> bool:
    return state is not None and (state in _TRANSIENT_STATES or state[:2] in _TRANSIENT_CLASSES)


def _is_without_primary(error: BaseException) -> bool:
    cause: BaseException | None = getattr(error, "orig", None) or error
    while cause is not None:
        if type(cause).__name__ == _NO_PRIMARY:
            return True
        cause = cause.__cause__
    return False


def _has_unknown_host(error: BaseException) -> bool:
    cause: BaseException | None = getattr(error, "orig", None) or error
    text = str(cause)
    if _UNKNOWN_HOST.search(text) and not _TRY_AGAIN.search(text):
        return True
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return cause.errno != socket.EAI_AGAIN
        cause = cause.__cause__
    return False


def _is_about(error: DBAPIError, codes: _Codes, in_sqlite: re.Pattern[str]) -> bool:
    if _is_sqlite(error):
        return bool(in_sqlite.match(str(error.orig)))
    return _sqlstate(error) in codes or _number(error) in codes


def _sqlstate(error: BaseException) -> str | None:
    original = getattr(error, "orig", None) or error
    arguments = original.args
    first = arguments[0] if arguments else None
    for state in (
        getattr(original, "sqlstate", None),  # psycopg, asyncpg, MySQL Connector
        getattr(original, "pgcode", None),  # psycopg2
        first.get("C") if isinstance(first, dict) else None,  # pg8000
        first,  # pyodbc
    ):
        if isinstance(state, str) and _SQLSTATE.fullmatch(state):
            return state
    return None


def _number(error: DBAPIError) -> int | None:
    arguments = error.orig.args if error.orig is not None else ()
    first = arguments[0] if arguments else None
    for number in (getattr(error.orig, "errno", None), first):  # MySQL Connector; the others
        if isinstance(number, int):
            return number
    return None


def _is_sqlite(error: DBAPIError) -> bool:
    return type(error.orig).__module__.startswith("sqlite3")
