"""The statements of a unit of work on the driver's own connection, past SQLAlchemy's Core.

Off unless ``create_isolation(driver_statements=True)`` asks for it, and for asyncpg only: there
Core and its adapter take longer than the statement itself. The way is SQLAlchemy's documented one
to a driver's own methods, ``AdaptedConnection.run_async()``; checking out, slots, retries and
cancellation stay as they are. What listens to statements does not see these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import ClauseElement, Connection, Executable
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from .results import Result, executed

_INTEGRITY = "23"  # the class of SQLSTATEs


class DriverStatements:
    """Executes statements that are always the same objects, each compiled once."""

    def __init__(self) -> None:
        """Begin with nothing compiled."""
        self._compiled: dict[Executable, tuple[str, list[str], dict[str, Any]]] = {}

    def executed(
        self, connection: Connection, statement: Executable, parameters: Mapping[str, Any]
    ) -> Result:
        """Execute a statement, by SQLAlchemy where it would be in a transaction.

        :raises DBAPIError: what asyncpg raises, in the form that SQLAlchemy gives to errors
        """
        if not _autocommits(connection):
            return executed(connection, statement, parameters)
        adapted: Any = connection.connection.dbapi_connection
        text, names, values = self._compiled.get(statement) or self._compile(connection, statement)
        values = {**values, **parameters}
        arguments = [values[name] for name in names]
        try:
            return Result(adapted.run_async(lambda driver: driver.fetch(text, *arguments)), -1)
        except Exception as error:
            raise _in_form(connection, text, arguments, error) from error
        except BaseException:
            connection.invalidate()  # cancelled: the driver may be in the middle of an answer
            raise

    def _compile(
        self, connection: Connection, statement: Executable
    ) -> tuple[str, list[str], dict[str, Any]]:
        compiled: Any = cast("ClauseElement", statement).compile(dialect=connection.dialect)
        made = str(compiled), list(compiled.positiontup), dict(compiled.params)
        self._compiled[statement] = made
        return made


def _autocommits(connection: Connection) -> bool:
    """Tell whether a statement commits by itself. A listener may have begun a transaction."""
    if connection.dialect.driver != "asyncpg" or connection.in_transaction():
        return False
    adapted: Any = connection.connection.dbapi_connection
    driver: Any = connection.connection.driver_connection
    return bool(adapted.autocommit) and not driver.is_in_transaction()


def _in_form(
    connection: Connection, text: str, arguments: list[Any], error: Exception
) -> DBAPIError:
    driver: Any = connection.connection.driver_connection
    is_lost = driver.is_closed() or isinstance(error, OSError)
    if is_lost:
        connection.invalidate(error)
    state = getattr(error, "sqlstate", None) or ""
    kind = IntegrityError if state.startswith(_INTEGRITY) else OperationalError
    return kind(
        text,
        arguments,
        error,
        hide_parameters=connection.engine.hide_parameters,
        connection_invalidated=is_lost,
    )
