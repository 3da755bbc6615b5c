"""States that are renamed, in their column and in data. For ``conversations.py``.

What is put in order is no write: nothing lives the longer for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table
from sqlalchemy.dialects.sqlite.base import SQLiteDialect

from .results import executed

_ESCAPE = "\\"
GROUP_ENDS = (":", ".")
"""What comes after a group's name: a state, or a group in it."""


class Renames:
    """Renames states."""

    def __init__(self, table: Table) -> None:
        """Remember the table."""
        self.table: Table = table
        columns = table.c
        kept = ("written_at", "idle_handled") if "written_at" in columns else ()
        self._untouched = {name: columns[name] for name in kept}

    def rename_state(
        self, connection: Connection, ids: Sequence[str], old: str, new: str, *, is_group: bool
    ) -> int:
        """Rename the state, or the group of the state, of rows that are still in it.

        :return: how many there were
        """
        state = self.table.c.state
        value: Any = new
        if is_group:
            rest = sa.func.substr(state, len(old) + 1, type_=sa.String)
            value = sa.literal(new, sa.String).concat(rest)
        statement = sa.update(self.table).where(
            self.table.c.id.in_(ids), _is_in(state, old, is_group)
        )
        statement = statement.values(state=value, **self._untouched)
        return executed(connection, statement, {}).changed

    def in_state(
        self, connection: Connection, name: str, after: str, limit: int, *, is_group: bool
    ) -> list[str]:
        """Return the ids of some rows in a state, or in a group of states, in their order."""
        columns = self.table.c
        statement = sa.select(columns.id).where(
            columns.id > after, _is_in(columns.state, name, is_group)
        )
        found = executed(connection, statement.order_by(columns.id).limit(limit), {})
        return [id for (id,) in found.rows or ()]

    def with_states_in_data(
        self, connection: Connection, after: str, limit: int
    ) -> Sequence[tuple[str, str | None]]:
        """Return ids and data of rows of scenes' histories and of dialogs."""
        columns = self.table.c
        statement = (
            sa.select(columns.id, columns.data)
            .where(
                columns.id > after,
                sa.or_(columns.destiny == "scenes_history", columns.destiny.like("aiogd:%")),
            )
            .order_by(columns.id)
            .limit(limit)
        )
        return [(id, data) for id, data in executed(connection, statement, {}).rows or ()]

    def data_locked(self, connection: Connection, id: str) -> str | None:
        """Return the data of a row as it is by now, and lock it."""
        self._begin(connection)
        statement = sa.select(self.table.c.data).where(self.table.c.id == id).with_for_update()
        data: str | None = executed(connection, statement, {}).scalar()
        return data

    def set_data(self, connection: Connection, id: str, data: str) -> None:
        """Replace the data of a row that is locked. It is not written to: its time stays."""
        statement = sa.update(self.table).where(self.table.c.id == id)
        executed(connection, statement.values(data=data, **self._untouched), {})

    def _begin(self, connection: Connection) -> None:
        """Take SQLite's write lock, which a read does not take, and begin the transaction.

        A savepoint before that would be the transaction itself, and its release would commit.
        """
        if isinstance(connection.dialect, SQLiteDialect):
            nothing = sa.update(self.table).where(sa.false())
            executed(connection, nothing.values(id=self.table.c.id, **self._untouched), {})


def _is_in(state: sa.Column[Any], name: str, is_group: bool) -> sa.ColumnElement[bool]:
    """Return the condition under which a state is the named one, or in that group or one in it."""
    if not is_group:
        return state == name
    escaped = name.replace(_ESCAPE, 2 * _ESCAPE).replace("%", r"\%").replace("_", r"\_")
    likes = [state.like(f"{escaped}{end}%", escape=_ESCAPE) for end in GROUP_ENDS]
    # SQLite's LIKE takes "a" and "A" for the same.
    return sa.and_(sa.or_(*likes), sa.func.substr(state, 1, len(name), type_=sa.String) == name)
