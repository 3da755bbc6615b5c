"""Savepoints in a session that the storage has not opened. For ``scopes.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import DBAPIError, ResourceClosedError
from sqlalchemy.orm import Session

from .slots import is_shared

_ENDED_INSIDE = (
    "a function has committed or rolled back your session inside a nested transaction(), and with "
    "it all that came before: in place of using(session), open `storage.transaction()`, where the "
    "commit of such a function is a savepoint"
)


def begin_savepoint(
    session: Session, bind_arguments: dict[str, Any]
) -> Callable[[bool, Session], object]:
    """Begin what can be undone by itself, and return what releases it, or rolls back to it."""
    begin_for_real(session.connection(bind_arguments))
    savepoint = session.begin_nested()
    refused: DBAPIError | None = None

    def end(commits: bool, _: Session) -> None:
        nonlocal refused
        if refused is not None:
            # SQLAlchemy takes it for released, and PostgreSQL would not commit the rest.
            raise refused
        try:
            savepoint.commit() if commits else savepoint.rollback()
        except ResourceClosedError as error:
            raise ResourceClosedError(_ENDED_INSIDE) from error
        except DBAPIError as error:
            refused = error if "RELEASE SAVEPOINT" in (error.statement or "") else None
            raise

    return end


def begin_for_real(connection: Connection) -> None:
    """Begin in SQLite, where Python's driver begins before the first write only.

    A savepoint before that would be the transaction itself, and its release would commit.
    """
    if isinstance(connection.dialect, SQLiteDialect):
        driver_connection = connection.connection.driver_connection
        if driver_connection is not None and not driver_connection.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def invalidate(bind_arguments: dict[str, Any], session: Session) -> None:
    """Close the connection of a session's transaction, unless others use it too."""
    if session.in_transaction():
        connection = session.connection(bind_arguments)
        if not is_shared(connection.engine):
            connection.invalidate()
