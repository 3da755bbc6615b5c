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

from .changes import Texts
from .clock import Clock
from .results import executed, per_dialect
from .rows import Rows
from .upsert import native_insert, telling

_NO_AGES: Mapping[str, float] = {}
_AT_ONCE = 100_000  # characters of one statement: the least that MySQL takes is a million bytes


class AbsentRows:
    """Inserts rows into a table unless they are there."""

    def __init__(self, rows: Rows) -> None:
        """Build the statements that are the same on every database."""
        table = rows.table
        self._rows = rows
        self._insert = per_dialect(partial(_insert, table, rows.lookups.values))
        these = table.c.id.in_(sa.bindparam("_rows", expanding=True))
        self._select: Any = sa.select(table.c.id, table.c.state, table.c.data).where(these)
        self._delete = sa.delete(table).where(these)

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
            self._rows.check(connection, row, *texts)
        # In order, so that two who insert the same rows don't wait for each other.
        ordered = dict(sorted(given.items()))
        insert = self._insert(connection)
        inserted: set[str] = set()
        for portion in _portions(ordered):
            parameters: list[dict[str, Any]] = [
                {
                    **{"_row": row, "_state": texts.state, "_data": texts.data},
                    **columns[row],
                    **({"_age": ages.get(row, 0.0)} if self._rows.lookups.values else {}),
                }
                for row, texts in portion.items()
            ]
            if connection.dialect.insert_returning:
                inserted.update(connection.execute(insert, parameters).scalars())
            else:
                for each in parameters:
                    if executed(connection, insert, each).found():
                        inserted.add(each["_row"])
        return inserted

    def read(self, connection: sa.Connection, rows: Sequence[str]) -> dict[str, Texts]:
        """Return what rows hold, without those that are not there."""
        found = executed(connection, self._select, {"_rows": list(rows)}).rows or ()
        return {row: Texts(state, data) for row, state, data in found}

    def delete(self, connection: sa.Connection, rows: Sequence[str]) -> None:
        """Delete rows."""
        executed(connection, self._delete, {"_rows": list(rows)})


def _insert(table: sa.Table, lookups: dict[str, Any], dialect: sa.Dialect) -> sa.Executable:
    """Return the insert that leaves alone what is there, and tells which rows it has inserted."""
    values: dict[str, Any] = {
        "id": sa.bindparam("_row"),
        "state": sa.bindparam("_state"),
        "data": sa.bindparam("_data"),
        **lookups,
    }
    if lookups:
        values["written_at"] = Clock() - sa.bindparam("_age", type_=sa.Double)
    statement: sa.Insert
    if isinstance(dialect, MySQLDialect):
        # ON DUPLICATE KEY UPDATE doesn't tell one from the other: it counts rows found.
        statement = mysql.insert(table).values(values).prefix_with("IGNORE")
    else:
        statement = native_insert(dialect)(table).values(values)
        statement = statement.on_conflict_do_nothing(index_elements=["id"])
    return telling(statement, table, dialect)


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
