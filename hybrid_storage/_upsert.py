"""Writes that need no row to be there: native insert-or-update, a savepoint where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    ColumnDefault,
    ColumnElement,
    Dialect,
    Executable,
    Insert,
    Table,
    Update,
    bindparam,
    func,
    insert,
    or_,
    update,
)
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import IntegrityError

from ._statements import Answer, Ask, Steps

Run = Callable[[Ask], Steps[Answer]]


def is_empty(column: ColumnElement[str | None]) -> ColumnElement[bool]:
    """Return the condition under which a data column stands for no data."""
    return or_(column.is_(None), column == "")


def telling(statement: Insert | Update, table: Table, dialect: Dialect) -> Executable:
    """Return a conditional write whose answer tells whether it found its condition true.

    Not every driver counts rows, or still knows how many there were when it is asked.

    :param statement: the write
    :param table: its table
    :param dialect: the dialect of the database that will run it
    """
    is_insert = isinstance(statement, Insert)
    returns = dialect.insert_returning if is_insert else dialect.update_returning
    return statement.returning(table.c.id) if returns else statement


def _on_update(table: Table) -> dict[str, Any]:
    # A model of the user's may have a column such as updated_at=mapped_column(onupdate=...):
    # SQLAlchemy sees to those in an UPDATE, but not in the UPDATE half of an upsert.
    return {
        column.key: column.onupdate.arg
        for column in table.columns
        if isinstance(column.onupdate, ColumnDefault) and not column.onupdate.is_callable
    }


class Upsert:
    """Sets one column of the row with a given id, and makes the row where there is none."""

    def __init__(self, table: Table, column: str, dialect: Dialect, run: Run) -> None:
        """Build the statements.

        :param table: the table, with a primary key ``id``
        :param column: the name of the column to set
        :param dialect: the dialect of the database that will run them
        :param run: runs a statement
        """
        self._run = run
        self._always: Insert | None = None
        self._if_empty: Executable | None = None
        # MySQL counts 1 for a row inserted and for one found as it was.
        self._tells = not isinstance(dialect, MySQLDialect)
        values: dict[str, Any] = {"id": bindparam("_row"), column: bindparam("_value")}
        # An onupdate that is a function of Python's is called for an UPDATE only.
        self._updates_first = any(
            isinstance(column.onupdate, ColumnDefault) and column.onupdate.is_callable
            for column in table.columns
        )
        self._insert = insert(table).values(values)
        self._update = (
            update(table)
            .where(table.c.id == bindparam("_row"))
            .values({column: bindparam("_value")})
        )
        self._update_if_empty = self._update.where(is_empty(table.c[column]))
        if isinstance(dialect, (PGDialect, SQLiteDialect)):
            native = postgresql_insert if isinstance(dialect, PGDialect) else sqlite_insert
            new = native(table).values(values)
            changes = {column: new.excluded[column], **_on_update(table)}
            self._always = new.on_conflict_do_update(index_elements=["id"], set_=changes)
            if_empty = new.on_conflict_do_update(
                index_elements=["id"], set_=changes, where=is_empty(table.c[column])
            )
            self._if_empty = telling(if_empty, table, dialect)
        elif isinstance(dialect, MySQLDialect):
            row = mysql_insert(table).values(values)
            value, old = row.inserted[column], table.c[column]
            changes = _on_update(table)
            self._always = row.on_duplicate_key_update({column: value, **changes})
            filled = func.if_(is_empty(old), value, old)
            self._if_empty = row.on_duplicate_key_update({column: filled, **changes})

    def set(self, row: str, value: str) -> Steps[None]:
        """Set the column to a value.

        :param row: the row's id
        :param value: the new value
        """
        parameters = {"_row": row, "_value": value}
        if self._always is not None:
            if self._updates_first and (yield from self._finds(self._update, parameters)):
                return
            yield from self._run(Ask(self._always, parameters))
        elif not (yield from self._update_or_insert(self._update, parameters)):
            # Lost a race for the first write: now there is a row to update.
            yield from self._run(Ask(self._update, parameters))

    def set_if_empty(self, row: str, value: str) -> Steps[bool]:
        """Set the column only if it holds nothing so far.

        :param row: the row's id
        :param value: the new value
        :return: True if the value was set; False if it was not, or if the database does not tell
        """
        parameters = {"_row": row, "_value": value}
        if self._if_empty is None:
            return (yield from self._update_or_insert(self._update_if_empty, parameters))
        if self._updates_first and (yield from self._finds(self._update_if_empty, parameters)):
            return True
        return (yield from self._finds(self._if_empty, parameters)) and self._tells

    def _update_or_insert(self, statement: Executable, parameters: dict[str, Any]) -> Steps[bool]:
        if (yield from self._finds(statement, parameters)):
            return True
        try:
            yield from self._run(Ask(self._insert, parameters, in_savepoint=True))
        except IntegrityError:
            return False
        return True

    def _finds(self, statement: Executable, parameters: dict[str, Any]) -> Steps[bool]:
        return (yield from self._run(Ask(statement, parameters))).found()
