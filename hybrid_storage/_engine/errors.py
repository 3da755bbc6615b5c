"""What an error of the database means, whichever driver raised it.

PostgreSQL's drivers carry an SQLSTATE, MySQL's an error number, SQLite's a message: which of them
pass by themselves is in ``codes.py``. An attempt to connect is told by less: asyncpg lets
``OSError`` through, and psycopg has no SQLSTATE for what the server answered, in whatever language
the server speaks.
"""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any, TypeAlias

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .codes import (
    CLIENT_ERRORS_OF_MYSQL,
    LASTING_TEXTS_OF_STATES,
    MISPLACED_STATEMENT,
    NO_SUCH_HOST_YET,
    OF_THE_WRONG_SERVER,
    TRANSIENT_CLASSES,
    TRANSIENT_IN_MYSQL,
    TRANSIENT_STATES,
    TRANSIENT_TEXTS_IN_MYSQL,
    TRANSIENT_TEXTS_OF_STATES,
)

_Codes: TypeAlias = frozenset[str | int | None]

_MISSING_TABLE: _Codes = frozenset({"42P01", "42S02", 1146})
_MISSING_COLUMN: _Codes = frozenset({"42703", "42S22", 1054})
_MISSING_TABLE_IN_SQLITE = re.compile(r"no such table")
_MISSING_COLUMN_IN_SQLITE = re.compile(r"no such column|table .* has no column")

_LOCK_TIMEOUT: _Codes = frozenset({"55P03", 1205})
# OC: Aurora DSQL. 1020: MariaDB with innodb_snapshot_isolation, the default since 11.6.
_SERIALIZATION_FAILURE: _Codes = frozenset({"40001", "OC000", "OC001", 1020})
_ROLLS_BACK: _Codes = frozenset({1020, 1205, 1213})  # 1205: with innodb_rollback_on_timeout
_NO_SAVEPOINT: _Codes = frozenset({"3B001", "25P01", 1305})  # 1305: also for a function
_NO_SAVEPOINT_IN_SQLITE = re.compile(r"no such savepoint")

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
    rf"|{LASTING_TEXTS_OF_STATES['08P01'].pattern}"
)
_NOT_YET = re.compile(
    r"starting up|shutting down|recovery|not yet accepting|too many|slots are reserved"
)
_OF_THE_SERVER = ":  "  # libpq writes two blanks after the severity, in every language

# Of asyncpg, between the server's word that it ends the connection and the end itself: it sends
# nothing then. SQLAlchemy 2.0.24 does not wrap it.
_HANGING_UP = re.compile(r"cannot switch to state \d+; another operation \(2\) is in progress")


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
    return _sqlstate(error) in MISPLACED_STATEMENT


def is_of_the_wrong_server(error: DBAPIError) -> bool:
    """Tell whether a server takes no writes, as the old primary after a failover."""
    codes = _sqlstate(error), _number(error)
    return is_transient(error) and not OF_THE_WRONG_SERVER.isdisjoint(codes)


def is_lock_timeout(error: DBAPIError) -> bool:
    """Tell whether a statement has waited for a lock for as long as it may."""
    return _is_about(error, _LOCK_TIMEOUT, _BUSY_IN_SQLITE)


def is_serialization_failure(error: DBAPIError) -> bool:
    """Tell whether the isolation level wants the transaction to be done once more."""
    return _sqlstate(error) in _SERIALIZATION_FAILURE or _number(error) in _SERIALIZATION_FAILURE


def has_rolled_back(error: BaseException | None) -> bool:
    """Tell whether MariaDB or MySQL has rolled the whole transaction back, savepoints included."""
    while error is not None:
        if isinstance(error, DBAPIError) and _number(error) in _ROLLS_BACK:
            return True
        error = error.__cause__ or error.__context__
    return False


def is_missing_savepoint(error: SQLAlchemyError) -> bool:
    """Tell whether a savepoint has gone, so that the transaction around it has ended."""
    return (
        isinstance(error, DBAPIError)
        and "SAVEPOINT" in (error.statement or "")
        and _is_about(error, _NO_SAVEPOINT, _NO_SAVEPOINT_IN_SQLITE)
    )


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may succeed a little later.

    It may after a dropped connection, while a server restarts, after a deadlock, a serialization
    failure or a lock timeout, and where SQLite or a pool is busy. It may not where the statement,
    the data, the permissions, the password or the host's name are wrong.
    """
    if _has_unknown_host(error) or _has_lasting_text(error):  # after which a pooler may hang up
        return False
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or _is_transient_answer(error)
    # What asyncpg raises while it connects is not wrapped.
    return (
        isinstance(error, (OSError, asyncio.TimeoutError, PoolTimeoutError))
        or _is_transient_answer_of_postgresql(error)
        or bool(_HANGING_UP.search(str(error)))
    )


def in_short(error: BaseException) -> str:
    """Return an error's first line for the log, without the statement and its parameters."""
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}".split("\n")[0]


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "orig", None) or error


def _is_transient_answer(error: DBAPIError) -> bool:
    if _is_sqlite(error):
        return bool(_BUSY_IN_SQLITE.match(str(error.orig)))
    number = _number(error)
    if number in TRANSIENT_TEXTS_IN_MYSQL:
        return bool(TRANSIENT_TEXTS_IN_MYSQL[number].search(str(error.orig)))
    if number is not None:
        return number in TRANSIENT_IN_MYSQL or number in CLIENT_ERRORS_OF_MYSQL
    if _sqlstate(error) is not None or NO_SUCH_HOST_YET.search(str(error.orig)):
        return _is_transient_answer_of_postgresql(error)
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


def _is_transient_answer_of_postgresql(error: BaseException) -> bool:
    state, text = _sqlstate(error), str(_cause(error))
    if state is None:
        return bool(NO_SUCH_HOST_YET.search(text))
    if state in TRANSIENT_TEXTS_OF_STATES:
        return bool(TRANSIENT_TEXTS_OF_STATES[state].search(text))
    return state in TRANSIENT_STATES or state[:2] in TRANSIENT_CLASSES


def _has_lasting_text(error: BaseException) -> bool:
    text = LASTING_TEXTS_OF_STATES.get(_sqlstate(error) or "")
    return text is not None and bool(text.search(str(_cause(error))))


def _has_unknown_host(error: BaseException) -> bool:
    cause: BaseException | None = _cause(error)
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
    original = _cause(error)
    first = next(iter(original.args), None)
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
    original = _cause(error)
    first = next(iter(original.args), None)
    for number in (getattr(original, "errno", None), first):  # MySQL Connector; the others
        if isinstance(number, int):
            return number
    return None


def _is_sqlite(error: DBAPIError) -> bool:
    return type(error.orig).__module__.startswith("sqlite3")
