"""How a statement gets to the database: through SQLAlchemy, or by the driver's own cursor.

To compile a statement once and hand its text to the driver takes a small part of the time that
SQLAlchemy's execution takes: the statement's key in a cache, a context, a result and its rows. The
storage's statements need none of that; an application that listens to statements, or logs them,
does. So the runner chooses, and the operations do not know the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from sqlalchemy import Connection, Dialect, Executable, Select, UpdateBase
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler


class Answer(NamedTuple):
    """What a database says to a statement."""

    rows: Sequence[Sequence[Any]] | None
    """All rows; None if the statement returns none."""
    count: int
    """How many rows a statement that returns none has found, if the driver knows."""

    def scalar(self) -> Any:
        """Return the first column of the first row, None if there is no row."""
        return self.rows[0][0] if self.rows else None

    def found(self) -> bool:
        """Tell whether there was a row to read or to change."""
        return self.count > 0 if self.rows is None else bool(self.rows)


class Executor:
    """Runs statements through SQLAlchemy."""

    def __init__(self, connection: Connection) -> None:
        """Remember where to.

        :param connection: a session's, for Session.execute() would flush its pending objects first
        """
        self.connection = connection
        self.dialect: Dialect = connection.dialect

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Answer:
        """Run a statement.

        :param statement: a Core statement
        :param parameters: its parameters
        :raises DBAPIError: whatever the database answers
        :return: what it says
        """
        result = self.connection.execute(statement, parameters)
        return Answer(result.all(), -1) if result.returns_rows else Answer(None, result.rowcount)

    def savepoint(self) -> AbstractContextManager[object]:
        """Return a context manager that undoes what is done inside if it fails."""
        return self.connection.begin_nested()


class Unclear(Exception):
    """The driver failed in a way that SQLAlchemy has to judge: the call is to be made by it."""


class DriverExecutor(Executor):
    """Runs statements by the cursor of the driver's connection."""

    def __init__(self, connection: Connection, texts: dict[Executable, Text | None]) -> None:
        """Remember where to.

        :param connection: a new connection of the pool's
        :param texts: the statements that have been compiled for its engine
        """
        super().__init__(connection)
        self._dbapi: Any = connection.connection.dbapi_connection
        self._texts = texts

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Answer:
        """Run a statement, as :class:`Executor` does.

        :raises Unclear: if this takes SQLAlchemy
        """
        try:
            text = self._texts[statement]
        except KeyError:
            text = self._texts[statement] = text_of(statement, parameters, self.dialect)
        if text is None:
            raise Unclear
        values = text.values(parameters)
        try:
            return self._run(text.sql, values)
        except Exception as error:
            raise self._judged(error, text.sql, values) from error

    def autocommit(self) -> bool:
        """Have each statement commit by itself.

        :return: whether that is to be ended, by :meth:`end_autocommit`
        """
        if self._dbapi.autocommit:
            return False
        try:
            self._dbapi.autocommit = True
        except Exception as error:
            raise self._judged(error) from error
        return True

    def end_autocommit(self) -> None:
        """Give the connection back as it was, unless it is lost."""
        if not self.connection.invalidated:
            self._dbapi.autocommit = False

    def commit(self) -> None:
        """Commit what the statements have written."""
        try:
            self._dbapi.commit()
        except Exception as error:
            raise self._judged(error) from error

    def _run(self, sql: str, values: Any) -> Answer:
        cursor = self._dbapi.cursor()
        try:
            cursor.execute(sql, values)
            rows = None if cursor.description is None else cursor.fetchall()
            return Answer(rows, cursor.rowcount)
        finally:
            cursor.close()

    def _judged(self, error: Exception, sql: str | None = None, values: Any = None) -> Exception:
        base = self.dialect.loaded_dbapi.Error
        pooled: Any = self.connection.connection
        if not isinstance(error, base) or self.dialect.is_disconnect(error, pooled, None):
            return Unclear()
        return DBAPIError.instance(
            sql,
            values,
            error,
            base,
            hide_parameters=self.connection.engine.hide_parameters,
            dialect=self.dialect,
        )


class AsyncpgExecutor(DriverExecutor):
    """Runs statements by asyncpg itself, which autocommits them.

    SQLAlchemy's cursor for asyncpg prepares statements in a cache of its own, and costs half of
    what asyncpg does.
    """

    def _run(self, sql: str, values: Any) -> Answer:
        return Answer(self._dbapi.run_async(lambda driver: driver.fetch(sql, *values)), -1)

    def _judged(self, error: Exception, sql: str | None = None, values: Any = None) -> Exception:
        return Unclear()  # asyncpg's own errors are not the dialect's


class Text:
    """A statement as the driver takes it."""

    def __init__(self, compiled: SQLCompiler, parameters: dict[str, Any]) -> None:
        """Remember the text, and what of its parameters is the same for each call.

        :param compiled: the compiled statement
        :param parameters: the parameters of a call
        """
        self.sql = str(compiled)
        names = compiled.positiontup if compiled.positional else None
        self._names: Sequence[str] | None = names
        every = compiled.construct_params(parameters)
        self._constant = {name: value for name, value in every.items() if name not in parameters}
        dialect = compiled.dialect
        self._processors = {
            name: process
            for bind, name in compiled.bind_names.items()
            if (process := bind.type.dialect_impl(dialect).bind_processor(dialect))
        }

    def values(self, parameters: dict[str, Any]) -> Any:
        """Return the parameters of a call in the form that the driver takes.

        :param parameters: by name
        """
        if self._constant:
            parameters = {**self._constant, **parameters}
        for name, process in self._processors.items():
            parameters = {**parameters, name: process(parameters[name])}
        if self._names is None:
            return parameters
        return tuple([parameters[name] for name in self._names])


def text_of(statement: Executable, parameters: dict[str, Any], dialect: Dialect) -> Text | None:
    """Return a statement's text, None if it takes SQLAlchemy to run it.

    :param statement: a Core statement
    :param parameters: the parameters of a call
    :param dialect: the dialect of the database
    """
    assert isinstance(statement, (Select, UpdateBase))
    compiled = statement.compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    # Columns of the application's own model may get values from functions of Python's, and its own
    # types may make something else of what the database sends. Lists are expanded for each call.
    if (
        compiled.insert_prefetch
        or compiled.update_prefetch
        or compiled.post_compile_params
        or any(
            column.type.dialect_impl(dialect).result_processor(dialect, None)
            for column in statement.exported_columns
        )
    ):
        return None
    return Text(compiled, parameters)
