"""The statements of a unit of work: all that an update reads, and all that it writes, at once.

PostgreSQL gets one statement for the writes, the check that the lock is still held, and freeing it.
Other databases get a transaction; so does PostgreSQL where somebody else has changed a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.types import TypeDecorator

from .changes import ChangedRow, Texts
from .clock import now
from .leases import NOBODY, Fence, Leases
from .results import Execute, executed
from .rows import Rows


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
        self.fits_one_statement: bool = _is_plain(table)
        """Whether PostgreSQL can do without a transaction."""
        self._one_statement: dict[tuple[bool, bool], sa.Executable] = {}
        these = table.c.id.in_(sa.bindparam("_rows", expanding=True))
        self._select: Any = sa.select(table.c.id, table.c.state, table.c.data).where(these)
        self._select_locked = self._select.order_by(table.c.id).with_for_update()
        this = table.c.id == sa.bindparam("_row")
        self._touch = sa.update(table).where(this).values(id=table.c.id)
        texts: dict[str, Any] = {"state": sa.bindparam("_state"), "data": sa.bindparam("_data")}
        self._update = sa.update(table).where(this).values(texts)
        self._insert = sa.insert(table).values({"id": sa.bindparam("_row"), **texts})
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
        is_postgresql = isinstance(connection.dialect, PGDialect)
        if not (changes and is_postgresql and self.fits_one_statement):
            return self.write(connection, changes, fence, frees=frees)
        for change in changes:
            self.check(connection, change)
        kind = (fence is not None, frees)
        if kind not in self._one_statement:
            locks = self._leases.table if fence is not None and self._leases is not None else None
            clock = now(connection.dialect)
            self._one_statement[kind] = _one_statement(self.table, locks, clock, frees=frees)
        held, is_written = self._execute(
            connection, self._one_statement[kind], {**_given(changes), **_fenced(fence)}
        ).first()
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
        if fence is not None and self._leases is not None:
            if not self._leases.holds(connection, fence, frees=frees):
                return Outcome.LOST
        elif changes and isinstance(connection.dialect, SQLiteDialect):
            # A transaction that reads first and writes later fails if another wrote in between.
            executed(connection, self._touch, {"_row": changes[0].row})
        there = [change.row for change in changes if change.found is not None]
        found = self._read(connection, self._select_locked, there) if there else {}
        for change in sorted(changes, key=lambda change: change.row):
            if change.found is not None:
                change.rebase(found[change.row])
            elif nests and not change.now.is_empty:
                try:
                    with connection.begin_nested():
                        self._put(connection, change)
                    continue
                except IntegrityError:
                    now = self._read(connection, self._select_locked, [change.row])[change.row]
                    if now is None:
                        raise
                    change.rebase(now)
            self._put(connection, change)
        return Outcome.WRITTEN

    def _put(self, connection: Connection, change: ChangedRow) -> None:
        parameters = {"_row": change.row, "_state": change.now.state, "_data": change.now.data}
        if change.now.is_empty:
            executed(connection, self._delete, {"_row": change.row})
        else:
            statement = self._insert if change.found is None else self._update
            executed(connection, statement, parameters)

    def _read(
        self, connection: Connection, select: sa.Executable, rows: Sequence[str]
    ) -> dict[str, Texts | None]:
        answer = executed(connection, select, {"_rows": list(rows)}).rows or ()
        found = {row: Texts(state, data) for row, state, data in answer}
        return {row: found.get(row) for row in rows}


def _given(changes: Sequence[ChangedRow]) -> dict[str, Any]:
    before = [change.found or Texts() for change in changes]
    return {
        "_rows": [change.row for change in changes],
        "_states": [change.now.state for change in changes],
        "_datas": [change.now.data for change in changes],
        "_old_states": [texts.state for texts in before],
        "_old_datas": [texts.data for texts in before],
        "_existed": [change.found is not None for change in changes],
    }


def _fenced(fence: Fence | None) -> dict[str, Any]:
    if fence is None:
        return {}
    return {"_row": fence.row, "_owner": fence.owner, "_version": fence.version}


def _one_statement(
    table: Table, locks: Table | None, clock: sa.ColumnElement[Any], *, frees: bool
) -> sa.Executable:
    """Return PostgreSQL's one statement: either all of it happens or nothing.

    Never an upsert: a row that was read and is gone is a conflict, or a conversation that was
    cleared meanwhile would come back to life. An insert that finds a row fails with all the rest.
    """
    names = ("_rows", "_states", "_datas", "_old_states", "_old_datas")
    given = sa.select(
        sa.func.unnest(
            *(sa.bindparam(name, type_=sa.ARRAY(sa.Text)) for name in names),
            sa.bindparam("_existed", type_=sa.ARRAY(sa.Boolean)),
        )
        .table_valued("id", "state", "data", "old_state", "old_data", "existed", name="given_rows")
        .render_derived()
    ).cte("given")
    holds: list[sa.ColumnElement[bool]] = []
    held: Any = sa.literal_column("1")
    this: Any = None
    if locks is not None:
        this = sa.and_(
            locks.c.id == sa.bindparam("_row"),
            locks.c.owner == sa.bindparam("_owner"),
            locks.c.version == sa.bindparam("_version"),
        )
        row = sa.select(locks.c.id).where(this).with_for_update().cte("held")
        held = sa.select(sa.func.count()).select_from(row).scalar_subquery()
        holds = [sa.exists(sa.select(row.c.id))]
    same = (
        sa.select(table.c.id)
        .join(given, table.c.id == given.c.id)
        .where(
            given.c.existed.is_(sa.true()),
            table.c.state.is_not_distinct_from(given.c.old_state),
            table.c.data.is_not_distinct_from(given.c.old_data),
            *holds,
        )
        .with_for_update(of=table)
        .cte("same")
    )
    existed = sa.select(sa.func.count()).select_from(given).where(given.c.existed.is_(sa.true()))
    unchanged = sa.select(sa.func.count()).select_from(same)
    ok = (
        sa.select(sa.literal_column("1").label("one"))
        .where(*holds, unchanged.scalar_subquery() == existed.scalar_subquery())
        .cte("ok")
    )
    is_ok = sa.exists(sa.select(ok.c.one))
    is_empty = sa.and_(
        given.c.state.is_(None),
        sa.func.coalesce(given.c.data, sa.literal_column("''")) == sa.literal_column("''"),
    )
    this_row = sa.and_(table.c.id == given.c.id, given.c.existed.is_(sa.true()), is_ok)
    texts = sa.select(given.c.id, given.c.state, given.c.data)
    writes = [
        sa.update(table)
        .where(this_row, ~is_empty)
        .values(state=given.c.state, data=given.c.data)
        .cte("changed"),
        sa.delete(table).where(this_row, is_empty).cte("removed"),
        sa.insert(table)
        .from_select(
            ["id", "state", "data"],
            texts.where(given.c.existed.is_(sa.false()), ~is_empty, is_ok),
        )
        .cte("added"),
    ]
    if locks is not None and frees:
        freed = {"owner": NOBODY, "expires": clock, "version": locks.c.version + 1}
        writes.append(sa.update(locks).where(this, is_ok).values(freed).cte("freed"))
    is_written = sa.select(sa.func.count()).select_from(ok).scalar_subquery()
    return sa.select(held, is_written).add_cte(*writes)


def _is_plain(table: Table) -> bool:
    """Tell whether the database alone makes the values of all columns."""
    if any(isinstance(table.c[name].type, TypeDecorator) for name in ("id", "state", "data")):
        return False
    defaults = (each for column in table.c for each in (column.default, column.onupdate))
    return not any(isinstance(each, sa.ColumnDefault) and each.is_callable for each in defaults)
