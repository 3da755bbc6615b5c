"""The columns to look conversations by, and which of these have expired. For the rest of ``_sql``.

``columns.py`` declares them. A table may do without; then no row expires.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Table

from .clock import Clock
from .results import executed

FIELDS = ("bot_id", "chat_id", "user_id", "thread_id", "business_connection_id", "destiny")
"""The columns that a ``StorageKey`` has a field for."""
FILLED = (*FIELDS, "conversation")
"""The columns that are filled from a key."""
COLUMNS = frozenset({*FILLED, "written_at", "idle_handled"})
"""All of them."""
_NEVER = 1e300  # seconds: of rows that have no time


def has_columns(table: Table) -> bool:
    """Tell whether a table has the columns."""
    return set(table.columns.keys()) >= COLUMNS


class Row(NamedTuple):
    """A row to write to: its id, and what its columns to look by are filled with."""

    id: str
    columns: Mapping[str, Any]
    """By the name of the parameter; empty if the table has no such columns."""

    def parameters(self, **others: Any) -> dict[str, Any]:
        """Return the parameters of a statement that writes to it."""
        return {"_row": self.id, **self.columns, **others}


def columns_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a :class:`Row`, by the name of the parameter."""
    return {f"_{name}": value for name, value in values.items()}


class Lookups:
    """What statements on a table have to say of its columns."""

    def __init__(self, table: Table, expires_after: float | None) -> None:
        """Build the conditions.

        :param expires_after: after how many seconds without a write a conversation reads as absent
        """
        self._expires_after = expires_after
        self.values: dict[str, Any] = (
            {name: sa.bindparam(f"_{name}", type_=table.c[name].type) for name in FILLED}
            if has_columns(table)
            else {}
        )
        """What each write fills in."""
        self.alive: sa.ColumnElement[bool] = sa.true()
        """The condition under which a row is there for those who read."""
        self._sweep: sa.Delete | None = None
        if expires_after is None:
            return
        since = Clock() - expires_after
        other = table.alias("other")
        newest = sa.func.max(sa.func.coalesce(other.c.written_at, _NEVER))
        of_this = sa.select(newest).where(other.c.conversation == table.c.conversation)
        self.alive = sa.func.coalesce(of_this.scalar_subquery(), _NEVER) > since
        # MySQL does not delete from a table that it reads, unless from a copy.
        of_one = sa.select(newest.label("time")).where(
            other.c.conversation == sa.bindparam("_conversation")
        )
        self._sweep = sa.delete(table).where(
            table.c.conversation == sa.bindparam("_conversation"),
            # Once more of the row itself: PostgreSQL looks again at one that it has waited for.
            table.c.written_at <= since,
            sa.select(of_one.subquery("newest").c.time).scalar_subquery() <= since,
        )

    def sweep(self, connection: Connection, columns: Mapping[str, Any]) -> None:
        """Delete the rows of a conversation that has expired, before one of them is written.

        Or else what has expired would be there again, beside what is written.
        """
        if self._sweep is not None:
            executed(connection, self._sweep, {"_conversation": columns["_conversation"]})
