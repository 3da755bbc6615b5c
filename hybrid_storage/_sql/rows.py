"""Every statement on the table of conversations: text in, text out.

Each operation is a function of a ``Connection``. For ``operations.py`` and ``storage.py``.

Each operation is one statement, or statements that end well however they are interleaved with
those of others. So it is right under AUTOCOMMIT, where PostgreSQL needs one round trip a
statement, and right inside a transaction, be it the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.types import TypeDecorator

from .limits import Limits
from .lookups import Lookups, Row
from .results import executed, per_dialect
from .upsert import Upsert, is_empty, telling

_ATTEMPTS = 1000  # of one update_data(), before it gives up


class Rows:
    """The reads and writes on one table."""

    def __init__(self, table: sa.Table, expires_after: float | None = None) -> None:
        """Build the statements that are the same on every database.

        :param expires_after: after how many seconds without a write a conversation reads as absent
        """
        self.table: sa.Table = table
        self.lookups: Lookups = Lookups(table, expires_after)
        self.needs_transaction: bool = isinstance(table.c.data.type, TypeDecorator)
        """Whether :meth:`update_data` holds a lock from its read to its write."""
        self.keeps_time: bool = any(each.onupdate is not None for each in table.columns)
        self._dialect = per_dialect(partial(_Dialect, self))
        this_row = table.c.id == sa.bindparam("_row")
        there = sa.and_(this_row, self.lookups.alive)
        self._select_state = sa.select(table.c.state).where(there)
        self.select_data: sa.Select[Any] = sa.select(table.c.data).where(there)
        self._select_data_locked = sa.select(table.c.data).where(this_row).with_for_update()
        self._touch = sa.update(table).where(sa.false()).values(id=table.c.id)
        update = sa.update(table).where(this_row).values(self.lookups.values)
        self.replace_data: sa.Update = update.values(data=sa.bindparam("_value"))
        self._delete = sa.delete(table).where(this_row)
        self._delete_empty = self._delete.where(table.c.state.is_(None), is_empty(table.c.data))

    def get_state(self, connection: sa.Connection, row: str) -> str | None:
        """Return the state, None if there is none."""
        return self._read(connection, self._select_state, row)

    def get_data(self, connection: sa.Connection, row: str) -> str | None:
        """Return the data's text, None or an empty string if there is none."""
        return self._read(connection, self.select_data, row)

    def set_state(self, connection: sa.Connection, row: Row, state: str | None) -> None:
        """Set the state; None removes it, and the row with it if there is no data."""
        self._set(connection, row, self._dialect(connection).state, state)

    def set_data(self, connection: sa.Connection, row: Row, data: str) -> None:
        """Set the data; an empty string removes it, and the row with it if there is no state."""
        self._set(connection, row, self._dialect(connection).data, data or None)

    def clear(self, connection: sa.Connection, row: str) -> None:
        """Remove the row."""
        self._dialect(connection).limits.check_text(row)
        executed(connection, self._delete, {"_row": row})

    def update_data(
        self, connection: sa.Connection, row: Row, merge: Callable[[str | None], str]
    ) -> None:
        """Replace the data by what ``merge`` makes of it: read, then compare-and-set.

        :raises StaleDataError: if the row changed under every one of a great many attempts
        """
        dialect = self._dialect(connection)
        dialect.limits.check(connection, row.id)
        self.lookups.sweep(connection, row.columns)
        self.begin(connection)
        if self.needs_transaction:
            self._update_locked(connection, row, merge)
            return
        old = self._read(connection, self.select_data, row.id)
        written = False
        for _ in range(_ATTEMPTS):
            new = merge(old)
            # What is there already was stored by this call (MySQL does not tell) or by its equal.
            # But the time of the last write moves, if the table keeps it.
            if (new or None) == (old or None) and (written or not self.keeps_time or not new):
                return
            written = True
            if self._compare_and_set(connection, row, old, new):
                if not new:
                    self.delete_if_empty(connection, row.id)
                return
            # Inside a transaction this reads the latest row, whatever the isolation level showed
            # so far, and locks it: the next attempt succeeds.
            old = self._read(connection, self._select_data_locked, row.id)
        raise StaleDataError(
            f"the data of {row.id!r} in table {self.table.fullname!r} changed under each of "
            f"{_ATTEMPTS} attempts to update it: write to this key less often"
        )

    def _update_locked(
        self, connection: sa.Connection, row: Row, merge: Callable[[str | None], str]
    ) -> None:
        # A type that encrypts may write another text each time, which nothing can be compared with.
        dialect = self._dialect(connection)
        for _ in range(_ATTEMPTS):
            found = executed(connection, self._select_data_locked, {"_row": row.id})
            new = merge(found.scalar())
            dialect.limits.check(connection, row.id, new)
            if found.found():
                executed(connection, self.replace_data, row.parameters(_value=new))
                if not new:
                    self.delete_if_empty(connection, row.id)
                return
            if not new or dialect.data.set_if_empty(connection, row, new):
                return

    def check(self, connection: sa.Connection, row: str, *texts: str | None) -> None:
        """Refuse a key and texts that the database would not take, or not keep as they are.

        :raises ValueError: if the database cannot hold one of them, or all are too much at once
        """
        self._dialect(connection).limits.check(connection, row, *texts)

    def begin(self, connection: sa.Connection) -> None:
        """Take SQLite's write lock, which a read does not take.

        A transaction that reads first and writes later fails if another wrote in between. One that
        begins with a savepoint ends with the savepoint.
        """
        if isinstance(connection.dialect, SQLiteDialect):
            executed(connection, self._touch)

    def delete_if_empty(self, connection: sa.Connection, row: str) -> None:
        """Delete a row that holds neither a state nor data."""
        executed(connection, self._delete_empty, {"_row": row})

    def _read(self, connection: sa.Connection, statement: sa.Executable, row: str) -> str | None:
        self._dialect(connection).limits.check_text(row)
        return cast("str | None", executed(connection, statement, {"_row": row}).scalar())

    def _set(self, connection: sa.Connection, row: Row, column: Upsert, text: str | None) -> None:
        self.check(connection, row.id, text)
        self.lookups.sweep(connection, row.columns)
        if text is not None:
            column.set(connection, row, text)
        # First the column, then the row if nothing is left in it. The other way round, two
        # clients that unset one column each would both find the other's, and leave an empty row.
        elif column.unset(connection, row):
            self.delete_if_empty(connection, row.id)

    def _compare_and_set(
        self, connection: sa.Connection, row: Row, old: str | None, new: str
    ) -> bool:
        dialect = self._dialect(connection)
        dialect.limits.check(connection, row.id, new, old)
        if not old:
            return dialect.data.set_if_empty(connection, row, new)
        parameters = row.parameters(_old=dialect.comparable(old), _value=new)
        return executed(connection, dialect.compare_and_set, parameters).found()


class _Dialect:
    """What differs from one kind of database to another."""

    def __init__(self, rows: Rows, dialect: sa.Dialect) -> None:
        data = rows.table.c.data
        self.limits = Limits(rows.table, dialect)
        self._by_bytes = isinstance(dialect, MySQLDialect)
        self.state = Upsert(rows.table, "state", rows.lookups.values, dialect)
        self.data = Upsert(rows.table, "data", rows.lookups.values, dialect)
        # MySQL's "=" goes by the collation, which may ignore case and trailing blanks.
        unchanged = (
            sa.cast(data, sa.LargeBinary) == sa.bindparam("_old", type_=sa.LargeBinary)
            if self._by_bytes
            else data == sa.bindparam("_old")
        )
        self.compare_and_set = telling(rows.replace_data.where(unchanged), rows.table, dialect)

    def comparable(self, text: str) -> str | bytes:
        return text.encode() if self._by_bytes else text
