"""Writes that need no row to be there, in each database's own way. For the rest of ``_sql``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.postgresql.base import PGDialect

from .lookups import Row
from .results import executed

_HOLDS_SOMETHING = 2


def is_empty(column: sa.ColumnElement[str | None]) -> sa.ColumnElement[bool]:
    """Return the condition under which a data column stands for no data."""
    return sa.or_(column.is_(None), column == "")


def native_insert(dialect: sa.Dialect) -> Callable[[sa.Table], postgresql.Insert | sqlite.Insert]:
    """Return the ``insert()`` with ON CONFLICT, of PostgreSQL's or of SQLite's dialect.

    MySQL's, ``mysql.insert()``, has ON DUPLICATE KEY, which knows no conditions.
    """
    return postgresql.insert if isinstance(dialect, PGDialect) else sqlite.insert


def telling(
    statement: sa.Insert | sa.Update, table: sa.Table, dialect: sa.Dialect
) -> sa.Executable:
    """Return a conditional write whose answer tells whether it found its condition true.

    Not every driver counts rows, or still knows how many there were when it is asked.
    """
    is_insert = isinstance(statement, sa.Insert)
    returns = dialect.insert_returning if is_insert else dialect.update_returning
    return statement.returning(table.c.id) if returns else statement


def _on_update(table: sa.Table) -> dict[str, Any]:
    # A model of the user's may have a column such as updated_at=mapped_column(onupdate=...):
    # SQLAlchemy sees to those in an UPDATE, but not in the UPDATE half of an upsert.
    return {
        column.key: column.onupdate.arg
        for column in table.columns
        if isinstance(column.onupdate, sa.ColumnDefault) and not column.onupdate.is_callable
    }


class Upsert:
    """Sets the state or the data of the row with a given id, and makes the row if there is none."""

    def __init__(
        self, table: sa.Table, column: str, lookups: dict[str, Any], dialect: sa.Dialect
    ) -> None:
        """Build the statements.

        :param lookups: what else each write fills in
        """
        self._always: sa.Insert
        self._if_empty: sa.Executable
        self._tells_by_id = isinstance(dialect, MySQLDialect)
        values: dict[str, Any] = {column: sa.bindparam("_value"), **lookups}
        # An onupdate that is a function of Python's is called for an UPDATE only.
        self._updates_first = any(
            isinstance(column.onupdate, sa.ColumnDefault) and column.onupdate.is_callable
            for column in table.columns
        )
        this_row = table.c.id == sa.bindparam("_row")
        self._update = sa.update(table).where(this_row).values(values)
        other = table.c["data" if column == "state" else "state"]
        nothing = None if column == "state" else ""
        self._unset: sa.Executable = self._update.values({column: nothing})
        if dialect.update_returning:
            self._unset = self._update.values({column: nothing}).returning(other)
        self._update_if_empty = self._update.where(is_empty(table.c[column]))
        values = {"id": sa.bindparam("_row"), **values}
        if self._tells_by_id:
            row = mysql.insert(table).values(values)
            value, old = row.inserted[column], table.c[column]
            changes = {name: row.inserted[name] for name in lookups} | _on_update(table)
            self._always = row.on_duplicate_key_update({column: value, **changes})
            # MySQL counts 1 for a row inserted and for one found as it was. So the last id tells,
            # by its documented function; it is assigned first, before the column is filled.
            note = sa.func.last_insert_id(sa.func.if_(is_empty(old), 1, _HOLDS_SOMETHING))
            filled = sa.func.if_(is_empty(old), value, old)
            self._if_empty = row.on_duplicate_key_update(
                [
                    (other.name, sa.func.if_(note, other, other)),
                    (column, filled),
                    *changes.items(),
                ]
            )
        else:
            new = native_insert(dialect)(table).values(values)
            changes = {name: new.excluded[name] for name in (column, *lookups)}
            changes |= _on_update(table)
            self._always = new.on_conflict_do_update(index_elements=["id"], set_=changes)
            if_empty = new.on_conflict_do_update(
                index_elements=["id"], set_=changes, where=is_empty(table.c[column])
            )
            self._if_empty = telling(if_empty, table, dialect)

    def set(self, connection: sa.Connection, row: Row, value: str) -> None:
        """Set the column to a value."""
        parameters = row.parameters(_value=value)
        if self._updates_first and executed(connection, self._update, parameters).found():
            return
        executed(connection, self._always, parameters)

    def unset(self, connection: sa.Connection, row: Row) -> bool:
        """Remove the value, and tell whether the row may hold nothing any more."""
        result = executed(connection, self._unset, row.parameters())
        # A row that was returned has the other column.
        return result.changed > 0 or not all(result.column())

    def set_if_empty(self, connection: sa.Connection, row: Row, value: str) -> bool:
        """Set the column only if it holds nothing so far."""
        parameters = row.parameters(_value=value)
        if self._updates_first and executed(connection, self._update_if_empty, parameters).found():
            return True
        if self._tells_by_id:
            return connection.execute(self._if_empty, parameters).lastrowid != _HOLDS_SOMETHING
        return executed(connection, self._if_empty, parameters).found()
