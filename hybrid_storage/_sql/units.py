"""The statements of a unit of work: all that an update reads, and all that it writes, at once.

PostgreSQL gets one statement for the writes, the check that the lock is still held, and freeing it.
Other databases get a transaction; so does PostgreSQL where somebody else has changed a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.exc import IntegrityError

from .at_once import AtOnce, is_plain
from .changes import ChangedRow, Texts
from .leases import NOBODY, Fence, Leases
from .results import Execute, executed
from .rows import Rows
from .upsert import native_insert, telling

_Selects: TypeAlias = tuple[sa.Executable, ...]
"""Reads one row, and several."""


class Outcome(Enum):
    """What has become of a write."""

    WRITTEN = auto()
    CONFLICT = auto()
    """Nothing is written: a row is not as it was read."""
    LOST = auto()
    """Nothing is written: the lease is not held any more."""


class Units:
    """Reads rows together, and writes them together or not at all."""

    def __init__(
        self, rows: Rows, leases: Leases | None = None, execute: Execute = executed
    ) -> None:
        """Build the statements that are the same on every database.

        :param execute: executes the one statement that writes at once
        """
        table = rows.table
        self._execute = execute
        self.table: Table = table
        self._rows = rows
        self._leases = leases
        self.keeps_time: bool = rows.keeps_time
        self.fits_one_statement: bool = is_plain(table)
        """Whether PostgreSQL can do without a transaction."""
        self._at_once = AtOnce(table, leases, rows.lookups.values)
        this = table.c.id == sa.bindparam("_row")
        these = table.c.id.in_(sa.bindparam("_rows", expanding=True))
        select: Any = sa.select(table.c.id, table.c.state, table.c.data)
        # SQLAlchemy writes an IN anew for each execution, which takes it as long as all the rest.
        selects = select.where(this), select.where(these)
        self._select: _Selects = tuple(each.where(rows.lookups.alive) for each in selects)
        self._select_locked: _Selects = tuple(
            each.order_by(table.c.id).with_for_update() for each in selects
        )
        texts: dict[str, Any] = {
            "state": sa.bindparam("_state"),
            "data": sa.bindparam("_data"),
            **rows.lookups.values,
        }
        self._update = sa.update(table).where(this).values(texts)
        self._new = {"id": sa.bindparam("_row"), **texts}
        self._insert = sa.insert(table).values(self._new)
        self._delete = sa.delete(table).where(this)

    def look(self, connection: Connection, row: str) -> tuple[str, int]:
        """Return owner and version of a lock, nobody and 0 if it has no row."""
        return (NOBODY, 0) if self._leases is None else self._leases.look(connection, row)

    def read(self, connection: Connection, rows: Sequence[str]) -> dict[str, Texts | None]:
        """Return what rows hold, None for those that are not there."""
        for row in rows:
            self._rows.check(connection, row)
        return self._read(connection, self._select, rows)

    def check(self, connection: Connection, change: ChangedRow) -> None:
        """Refuse what the database cannot hold.

        :raises ValueError: if it cannot
        """
        self._rows.check(connection, change.row, *change.now)

    def write_at_once(
        self,
        connection: Connection,
        changes: Sequence[ChangedRow],
        fence: Fence | None,
        *,
        frees: bool,
    ) -> Outcome:
        """Write all rows if each is as it was read, and free the lease, in as little as it takes.

        :param fence: the lease to hold, None for no lease
        :param frees: whether to free it
        :raises IntegrityError: if a row is there that was not
        """
        # By the name: CockroachDB, whose dialect is a kind of PostgreSQL's, refuses a statement
        # that updates, deletes and inserts rows of one table.
        is_postgresql = connection.dialect.name == "postgresql"
        if not (changes and is_postgresql and self.fits_one_statement):
            return self.write(connection, changes, fence, frees=frees)
        for change in changes:
            self.check(connection, change)
        self._sweep(connection, changes)
        statement, parameters = self._at_once.statement(connection, changes, fence, frees=frees)
        held, is_written = self._execute(connection, statement, parameters).first()
        if not held:
            return Outcome.LOST
        return Outcome.WRITTEN if is_written else Outcome.CONFLICT

    def write(
        self,
        connection: Connection,
        changes: Sequence[ChangedRow],
        fence: Fence | None,
        *,
        frees: bool,
        nests: bool = False,
    ) -> Outcome:
        """Write all rows in a transaction, on top of what others have written meanwhile.

        :param fence: the lease to hold, None for no lease
        :param frees: whether to free it at the commit
        :param nests: whether an insert that finds a row must leave the transaction as it is
        :raises IntegrityError: if a row is there that was not, and the transaction does not nest
        """
        for change in changes:
            self.check(connection, change)
        leases = None if fence is None else self._leases
        if leases and fence and not leases.holds(connection, fence, frees=frees):
            return Outcome.LOST
        self._sweep(connection, changes)
        if fence is None:  # which has been written to otherwise
            self._rows.begin(connection)
        there = [change.row for change in changes if change.found is not None]
        found = self._read(connection, self._select_locked, there) if there else {}
        for change in sorted(changes, key=lambda change: change.row):
            if change.found is not None:
                change.rebase(found[change.row])
            elif nests and not change.now.is_empty:
                if self._insert_unless_there(connection, change):
                    continue
                now = self._read(connection, self._select_locked, [change.row])
                change.rebase(now[change.row])
            self._put(connection, change)
        return Outcome.WRITTEN

    def _sweep(self, connection: Connection, changes: Sequence[ChangedRow]) -> None:
        # A row that was found tells that the conversation has not expired.
        if changes and all(change.found is None for change in changes):
            self._rows.lookups.sweep(connection, changes[0].columns)

    def _insert_unless_there(self, connection: Connection, change: ChangedRow) -> bool:
        """Insert a row unless one is there, and tell whether it did; the transaction goes on.

        At REPEATABLE READ, PostgreSQL reports a row that the transaction does not see as what it
        is, a serialization failure, and not as a duplicate key.
        """
        if isinstance(connection.dialect, MySQLDialect):  # whose INSERT IGNORE ignores more
            try:
                with connection.begin_nested():
                    self._put(connection, change)
            except IntegrityError:
                return False
            return True
        insert = native_insert(connection.dialect)(self.table).values(self._new)
        unless_there = insert.on_conflict_do_nothing(index_elements=["id"])
        statement = telling(unless_there, self.table, connection.dialect)
        return executed(connection, statement, _parameters(change)).found()

    def _put(self, connection: Connection, change: ChangedRow) -> None:
        if change.now.is_empty:
            executed(connection, self._delete, {"_row": change.row})
        else:
            statement = self._insert if change.found is None else self._update
            executed(connection, statement, _parameters(change))

    def _read(
        self, connection: Connection, selects: _Selects, rows: Sequence[str]
    ) -> dict[str, Texts | None]:
        one, several = selects
        if len(rows) == 1:
            result = executed(connection, one, {"_row": rows[0]})
        else:
            result = executed(connection, several, {"_rows": list(rows)})
        answer = result.rows or ()
        found = {row: Texts(state, data) for row, state, data in answer}
        return {row: found.get(row) for row in rows}


def _parameters(change: ChangedRow) -> dict[str, Any]:
    texts = {"_row": change.row, "_state": change.now.state, "_data": change.now.data}
    return texts | dict(change.columns)
