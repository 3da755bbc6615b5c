"""PostgreSQL's one statement that takes a lock and reads what its update wants. For ``leases.py``.

PostgreSQL goes on planning a prepared statement for each execution's parameters if the plan that
fits any parameters looks more expensive. To the latter an array has ten elements. So a single row,
which is what most updates read, gets a statement with ``=``. Several rows get a LIMIT that limits
nothing: one that is a parameter looks like a tenth of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite

from .rows import Rows


class Taking:
    """The statement, for no row to read, for one and for several."""

    def __init__(self, upsert: postgresql.Insert | sqlite.Insert, locks: Table, rows: Rows) -> None:
        """Build the statements.

        :param upsert: takes the lock, unless somebody else has it
        :param rows: the conversations
        """
        self._taken = upsert.returning(locks.c.version).cte("taken")
        self._locks = locks
        self._none = self._selected(*(sa.null().label(name) for name in ("id", "state", "data")))
        table, alive = rows.table, rows.lookups.alive
        on = sa.and_(table.c.id == sa.bindparam("_wanted"), alive)
        self._one = self._reading(table, on)
        these = table.c.id == sa.any_(sa.bindparam("_wanted", type_=sa.ARRAY(sa.Text)))
        found = sa.select(table.c.id, table.c.state, table.c.data).where(these, alive)
        found = found.limit(sa.bindparam("_count", type_=sa.BigInteger))
        self._several = self._reading(found.subquery("found"), sa.true())

    def statement(self, wanted: Sequence[str]) -> tuple[sa.Executable, dict[str, Any]]:
        """Return the statement for some rows to read, and the parameters that name them.

        The reads see the database as it was when the statement began, the upsert sees the latest
        row: what is read is older than the lock, so compare the versions.
        """
        if not wanted:
            return self._none, {}
        if len(wanted) == 1:
            return self._one, {"_wanted": wanted[0]}
        return self._several, {"_wanted": list(wanted), "_count": len(wanted)}

    def _selected(self, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        seen = sa.select(self._locks.c.version).where(self._locks.c.id == sa.bindparam("_row"))
        taken = sa.select(self._taken.c.version)
        return sa.select(taken.scalar_subquery(), seen.scalar_subquery(), *columns)

    def _reading(self, found: sa.FromClause, on: sa.ColumnElement[bool]) -> sa.Select[Any]:
        one = sa.select(sa.literal_column("1").label("one")).subquery("one")
        selected = self._selected(found.c.id, found.c.state, found.c.data)
        return selected.select_from(one.outerjoin(found, on))
