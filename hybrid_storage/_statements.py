"""How a statement gets to the database: through SQLAlchemy, or by the driver's own cursor.

To compile a statement once and hand its text to the driver takes a small part of the time that
SQLAlchemy's execution takes: the statement's key in a cache, a context, a result and its rows. The
storage's statements need none of that; an application that listens to statements, or logs them,
does. So the runner chooses, and the operations do not know the difference.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from sqlalchemy import Connection, Dialect, Engine, Executable, Select, UpdateBase
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.sql.compiler import SQLCompiler

T = TypeVar("T")


class Answer(NamedTuple):
    """What a database says to a statement."""

    rows: Sequence[Sequence[Any]] | None
    """All rows; None if the statement returns none."""
    changed: int
    """How many rows a statement that returns none has found, if the driver knows."""

    def scalar(self) -> Any:
        """Return the first column of the first row, None if there is no row."""
        return self.rows[0][0] if self.rows else None

    def found(self) -> bool:
        """Tell whether there was a row to read or to change."""
        return self.changed > 0 if self.rows is None else bool(self.rows)


class Ask(NamedTuple):
    """A statement that an operation wants to be run."""

    statement: Executable
    parameters: dict[str, Any]
    in_savepoint: bool = False
    """Whether an error is to undo no more than the statement."""


Steps: TypeAlias = Generator[Ask, Answer, T]
"""An operation: it yields statements, is sent the answers, and returns its result.

So it does not know who waits for the database, or how.
"""
Operation: TypeAlias = Callable[[Dialect], Steps[T]]
"""Begins an operation for a kind of database."""


class Executor(ABC):
    """Runs the statements of operations."""

    dialect: Dialect

    def perform(self, operation: Operation[T]) -> T:
        """Run an operation's statements.

        :param operation: the operation
        :return: what it returns
        """
        steps = operation(self.dialect)
        try:
            ask = next(steps)
            while True:
                try:
                    answer = self._execute(ask)
                except Exception as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(answer)
        except StopIteration as end:
            return cast("T", end.value)

    @abstractmethod
    def _execute(self, ask: Ask) -> Answer:
        """Run a statement."""


class CoreExecutor(Executor):
    """Runs statements through SQLAlchemy."""

    def __init__(self, connection: Connection) -> None:
        """Remember where to.

        :param connection: a session's, for Session.execute() would flush its pending objects first
        """
        self.connection = connection
        self.dialect: Dialect = connection.dialect

    def _execute(self, ask: Ask) -> Answer:
        with self.connection.begin_nested() if ask.in_savepoint else nullcontext():
            result = self.connection.execute(ask.statement, ask.parameters)
            if result.returns_rows:
                return Answer(result.all(), -1)
            return Answer(None, result.rowcount)


class Unclear(Exception):
    """The driver failed in a way that SQLAlchemy has to judge: the call is to be made by it."""


class DriverExecutor(Executor):
    """Runs statements by the cursor of the driver's connection."""

    def __init__(
        self, engine: Engine, pooled: PoolProxiedConnection, texts: dict[Executable, Text | None]
    ) -> None:
        """Remember where to.

        :param engine: the engine
        :param pooled: a connection of its pool's that has not been used since it was checked out
        :param texts: the statements that have been compiled for the engine
        """
        self.dialect: Dialect = engine.dialect
        self._engine = engine
        self._pooled = pooled
        self._dbapi: Any = pooled.dbapi_connection
        self._texts = texts

    def _execute(self, ask: Ask) -> Answer:
        text, values = self._text(ask)
        try:
            return self._run(text, values)
        except Exception as error:
            raise self._judged(error, text, values) from error

    def _text(self, ask: Ask) -> tuple[str, Any]:
        try:
            text = self._texts[ask.statement]
        except KeyError:
            text = text_of(ask.statement, ask.parameters, self.dialect)
            self._texts[ask.statement] = text
        if text is None or ask.in_savepoint:
            raise Unclear
        return text.sql, text.values(ask.parameters)

    def autocommit(self) -> bool:
        """Have each statement commit by itself, unless a listener has begun a transaction.

        :return: whether they do, until :meth:`end_autocommit`
        """
        if self._dbapi.autocommit or self.in_transaction():
            return False
        try:
            self._dbapi.autocommit = True
        except self.dialect.loaded_dbapi.Error as error:
            judged = self._judged(error)
            if isinstance(judged, Unclear):
                raise judged from error
            return False  # it has begun one
        return True

    def in_transaction(self) -> bool:
        """Tell whether the driver knows that a transaction has begun, and would not say so."""
        return False

    def end_autocommit(self) -> None:
        """Give the connection back as it was, unless it is lost."""
        if self._pooled.is_valid:
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
        if not isinstance(error, base) or self.dialect.is_disconnect(error, self._pooled, None):
            return Unclear()
        return as_sqlalchemys(error, self._engine, sql, values)


def as_sqlalchemys(
    error: Any, engine: Engine, sql: str | None = None, values: Any = None
) -> DBAPIError:
    """Return a driver's error in the form that SQLAlchemy raises it.

    :param error: the error
    :param engine: the engine in whose service it was raised
    :param sql: the statement
    :param values: the statement's parameters
    """
    dialect = engine.dialect
    instance = DBAPIError.instance(
        sql,
        values,
        error,
        dialect.loaded_dbapi.Error,
        hide_parameters=engine.hide_parameters,
        dialect=dialect,
        connection_invalidated=dialect.is_disconnect(error, None, None),
    )
    return cast("DBAPIError", instance)


class AsyncpgExecutor(DriverExecutor):
    """Runs statements by asyncpg itself, which autocommits them.

    SQLAlchemy's cursor for asyncpg prepares statements in a cache of its own, and costs half of
    what asyncpg does; so does the greenlet that it needs.
    """

    def in_transaction(self) -> bool:
        # SQLAlchemy may take one to have begun that a listener has ended by its own means.
        return self._dbapi._transaction is not None or cast(
            "bool", self._dbapi.driver_connection.is_in_transaction()
        )

    async def perform_async(self, operation: Operation[T]) -> T:
        """Run an operation's statements, as :meth:`perform` does.

        :param operation: the operation
        :raises Unclear: if this takes SQLAlchemy
        :raises OSError: or TimeoutError; the connection cannot be used any more
        :return: what it returns
        """
        driver = self._dbapi.driver_connection
        steps = operation(self.dialect)
        try:
            ask = next(steps)
            while True:
                text, values = self._text(ask)
                try:
                    rows = await driver.fetch(text, *values)
                except (OSError, asyncio.TimeoutError):
                    raise  # they are not the driver's, and SQLAlchemy leaves them alone
                except Exception as error:
                    raise Unclear from error
                ask = steps.send(Answer(rows, -1))
        except StopIteration as end:
            return cast("T", end.value)


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
