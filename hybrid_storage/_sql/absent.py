"""Rows that come from elsewhere: inserted where there is none, and what is there is left alone.

For ``fallback.py`` and ``migration.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.exc import IntegrityError

from .changes import Texts
from .clock import Clock
from .results import executed, per_dialect
from .rows import Rows
from .upsert import is_empty, native_insert, telling

_NO_AGES: Mapping[str, float] = {}
_AT_ONCE = 100_000  # characters of one statement: the least that MySQL takes is a million bytes


class AbsentRows:
    """Inserts rows into a table unless they are there."""

    def __init__(self, rows: Rows) -> None:
        """Build the statements that are the same on every database."""
        table = rows.table
        self._rows = rows
        self._insert = per_dialect(partial(_Insert, table, rows.lookups.values))
        these = table.c.id.in_(sa.bindparam("_rows", expanding=True))
        self._select: Any = sa.select(table.c.id, table.c.state, table.c.data).where(these)
        self._delete = sa.delete(table).where(these)
        empty = sa.and_(table.c.state.is_(None), is_empty(table.c.data))
        self._delete_empty = self._delete.where(empty)

    def check(self, connection: sa.Connection, row: str, texts: Texts) -> None:
        """Refuse what the database cannot hold.

        :raises ValueError: if it cannot
        """
        self._rows.check(connection, row, *texts)

    def insert(
        self,
        connection: sa.Connection,
        given: Mapping[str, Texts],
        columns: Mapping[str, Mapping[str, Any]],
        ages: Mapping[str, float] = _NO_AGES,
    ) -> set[str]:
        """Insert the rows that are not there.

        Waits for transactions that have inserted one of them and are still open. In a transaction,
        those who want to insert one of them wait for its end.

        :param given: what the rows are to hold, by their ids
        :param columns: what their columns to look by are filled with
        :param ages: how many seconds ago they were written to, where that is known
        :raises ValueError: if the database cannot hold one of them
        :return: the ids of those that were inserted
        """
        for row, texts in given.items():
            self.check(connection, row, texts)
        # In order, so that two who insert the same rows don't wait for each other.
        ordered = dict(sorted(given.items()))
        insert = self._insert(connection)
        inserted: set[str] = set()
        for some in _portions(ordered):
            inserted |= insert(connection, some, columns, ages)
        return inserted

    def read(self, connection: sa.Connection, rows: Sequence[str]) -> dict[str, Texts]:
        """Return what rows hold, without those that are not there."""
        found = executed(connection, self._select, {"_rows": list(rows)}).rows or ()
        return {row: Texts(state, data) for row, state, data in found}

    def delete(self, connection: sa.Connection, rows: Sequence[str]) -> None:
        """Delete rows."""
        executed(connection, self._delete, {"_rows": list(rows)})

    def delete_if_empty(self, connection: sa.Connection, row: str) -> None:
        """Delete a row that holds neither a state nor data."""
        executed(connection, self._delete_empty, {"_rows": [row]})


class _Insert:
    """Inserts rows unless they are there, and tells which it has inserted."""

    def __init__(self, table: sa.Table, lookups: dict[str, Any], dialect: sa.Dialect) -> None:
        values: dict[str, Any] = {
            "id": sa.bindparam("_row"),
            "state": sa.bindparam("_state"),
            "data": sa.bindparam("_data"),
            **lookups,
        }
        if lookups:
            values["written_at"] = Clock() - sa.bindparam("_age", type_=sa.Double)
        self._has_age = bool(lookups)
        self._returns = dialect.insert_returning
        self._raises = False
        native = native_insert(dialect)
        statement: sa.Insert
        if native is not None:
            statement = native(table).values(values).on_conflict_do_nothing(index_elements=["id"])
        elif isinstance(dialect, MySQLDialect):
            # ON DUPLICATE KEY UPDATE doesn't tell one from the other: it counts rows found.
            statement = mysql.insert(table).values(values).prefix_with("IGNORE")
        else:
            statement, self._raises = sa.insert(table).values(values), True
        self._statement: Any = telling(statement, table, dialect)

    def __call__(
        self,
        connection: sa.Connection,
        given: Mapping[str, Texts],
        columns: Mapping[str, Mapping[str, Any]],
        ages: Mapping[str, float],
    ) -> set[str]:
        parameters: list[dict[str, Any]] = [
            {
                **{"_row": row, "_state": texts.state, "_data": texts.data},
                **columns[row],
                **({"_age": ages.get(row, 0.0)} if self._has_age else {}),
            }
            for row, texts in given.items()
        ]
        if self._returns and not self._raises and len(parameters) > 1:
            return {row for (row,) in connection.execute(self._statement, parameters)}
        return {each["_row"] for each in parameters if self._is_new(connection, each)}

    def _is_new(self, connection: sa.Connection, parameters: Mapping[str, Any]) -> bool:
        if not self._raises:
            return executed(connection, self._statement, parameters).found()
        try:
            with connection.begin_nested():
                executed(connection, self._statement, parameters)
        except IntegrityError:
            return False
        return True


def _portions(given: Mapping[str, Texts]) -> Iterator[dict[str, Texts]]:
    portion: dict[str, Texts] = {}
    size = 0
    for row, texts in given.items():
        length = len(row) + sum(len(text) for text in texts if text)
        if portion and size + length > _AT_ONCE:
            yield portion
            portion, size = {}, 0
        portion[row] = texts
        size += length
    if portion:
        yield portion
