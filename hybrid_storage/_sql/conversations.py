"""Statements on many conversations: pages of them, numbers, and changes of a batch at a time.

Each change says again which rows it is for, so that what others have written since the rows were
found is left alone. For ``conversations.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from .clock import Clock
from .results import executed
from .rows import Rows
from .upsert import is_empty

_ESCAPE = "\\"
GROUP_ENDS = (":", ".")
"""What comes after a group's name: a state, or a group in it."""
_LOOKED_AT = "hybrid_storage_looked_at"
"""When the first page was read, by the database's clock."""


@dataclass(frozen=True)
class Where:
    """Which rows to find."""

    fields: dict[str, Any] = field(default_factory=dict)
    """What columns hold, by their names."""
    states: Sequence[str] | None = None
    """The states to be in, None for any."""
    idle_for: float | None = None
    """Seconds without a write to any row of the conversation."""
    unhandled: float | None = None
    """Seconds of idleness that have not been dealt with."""


class Conversations:
    """Finds, counts and changes the rows of many conversations."""

    def __init__(self, rows: Rows) -> None:
        """Remember the table."""
        self.table: sa.Table = rows.table
        self._rows = rows
        self._alive = rows.lookups.alive
        # What is put in order is no write: nothing lives the longer for it.
        columns = self.table.c
        kept = ("written_at", "idle_handled") if "written_at" in columns else ()
        self._untouched = {name: columns[name] for name in kept}

    def row(self, connection: Connection, id: str) -> Any:
        """Return a row, None if it is not there."""
        statement = sa.select(self.table).where(self.table.c.id == id, self._alive)
        rows = executed(connection, statement).rows
        return rows[0] if rows else None

    def page(
        self, connection: Connection, where: Where, after: Any, limit: int
    ) -> Sequence[Sequence[Any]]:
        """Return the rows that come after another one, in an order that an index has.

        :param after: the last row of the page before, None for the first page
        """
        columns = self.table.c
        order: list[sa.Column[Any]] = [columns.id]
        # By time where that is all that is asked for: the oldest are at one end of its index.
        if where.idle_for is not None and where.states is None:
            order = [columns.written_at, columns.id]
        # Those that are written meanwhile come no more, or there would be no end to the pages.
        looked_at = Clock() if after is None else sa.literal(getattr(after, _LOOKED_AT), sa.Double)
        statement = sa.select(self.table, looked_at.label(_LOOKED_AT))
        statement = statement.where(*self._own(where), self._alive, *self._idle(where))
        if where.idle_for is not None:
            statement = statement.where(columns.written_at <= looked_at - where.idle_for)
        if after is not None:
            last = [sa.literal(getattr(after, column.name), column.type) for column in order]
            statement = statement.where(
                columns.id > last[0] if len(order) == 1 else sa.tuple_(*order) > sa.tuple_(*last)
            )
        return executed(connection, statement.order_by(*order).limit(limit)).rows or ()

    def page_to_delete(
        self, connection: Connection, where: Where, after: Any, limit: int
    ) -> Sequence[Any]:
        """Return rows by their ids, those that have expired included."""
        statement = sa.select(self.table.c.id).where(*self._own(where), *self._idle(where))
        return self._by_id(connection, statement, after, limit)

    def locked(self, connection: Connection, names: Sequence[str]) -> set[str]:
        """Lock all rows of conversations, and return their ids."""
        self._rows.begin(connection)
        columns = self.table.c
        statement = sa.select(columns.id).where(columns.conversation.in_(names))
        return set(executed(connection, statement.order_by(columns.id).with_for_update()).column())

    def count(self, connection: Connection, where: Where) -> dict[str | None, int]:
        """Return how many rows there are in each state."""
        state = self.table.c.state
        statement = sa.select(state, sa.func.count()).group_by(state)
        statement = statement.where(*self._own(where), self._alive, *self._idle(where))
        rows: Any = executed(connection, statement).rows or ()
        return dict(tuple(row) for row in rows)

    def set_state(
        self, connection: Connection, where: Where, ids: Sequence[str], state: str | None
    ) -> int:
        """Set the state of rows that are still to be found.

        :return: how many there were
        """
        statement = sa.update(self.table).where(*self._still(where, ids)).values(state=state)
        changed = executed(connection, statement).changed
        if state is None:
            columns = self.table.c
            empty = sa.and_(columns.state.is_(None), is_empty(columns.data))
            executed(connection, sa.delete(self.table).where(columns.id.in_(ids), empty))
        return changed

    def delete(self, connection: Connection, where: Where, ids: Sequence[str]) -> int:
        """Delete rows that are still to be found.

        :return: how many there were
        """
        statement = sa.delete(self.table).where(*self._still(where, ids))
        return executed(connection, statement).changed

    def delete_conversations(self, connection: Connection, names: Sequence[str]) -> None:
        """Delete all rows of conversations."""
        statement = sa.delete(self.table).where(self.table.c.conversation.in_(names))
        executed(connection, statement)

    def unfilled(self, connection: Connection, after: Any, limit: int) -> Sequence[Any]:
        """Return some rows whose columns have not been filled, by their ids."""
        columns = self.table.c
        statement = sa.select(columns.id).where(columns.conversation.is_(None))
        return self._by_id(connection, statement, after, limit)

    def handled(self, connection: Connection, conversation: str, after: float) -> None:
        """Mark a conversation's idleness as dealt with. It is not written to: its time stays."""
        columns = self.table.c
        values = {"idle_handled": after, "written_at": columns.written_at}
        statement = sa.update(self.table).where(columns.conversation == conversation)
        executed(connection, statement.values(values))

    def fill(
        self, connection: Connection, id: str, values: dict[str, Any], *, is_written: bool
    ) -> None:
        """Fill the columns of a row.

        :param is_written: whether that counts as a write. Otherwise its time stays
        """
        columns = self.table.c
        statement = sa.update(self.table).where(columns.id == id, columns.conversation.is_(None))
        time = {} if is_written else self._untouched
        executed(connection, statement.values({**values, **time}))

    def of(self, connection: Connection, name: str, where: Where) -> Sequence[Any]:
        """Return the rows of a conversation, those that have expired included."""
        statement = sa.select(self.table).where(
            self.table.c.conversation == name, *self._own(where)
        )
        return executed(connection, statement.order_by(self.table.c.id)).rows or ()

    def is_there(self, connection: Connection, name: str) -> bool:
        """Tell whether there is anything of a conversation, which is deleted if it has expired."""
        self._rows.lookups.sweep(connection, {"_conversation": name})
        statement = sa.select(self.table.c.id).where(self.table.c.conversation == name).limit(1)
        return executed(connection, statement).found()

    def move(self, connection: Connection, id: str, to: str, values: dict[str, Any]) -> bool:
        """Give a row another id, and the columns that belong to it, unless that id is taken.

        :return: whether it was free; otherwise the row is deleted, and what is there stays
        """
        columns = self.table.c
        values = {**values, "id": to, **self._untouched}
        self._rows.begin(connection)
        try:
            with connection.begin_nested():
                statement = sa.update(self.table).where(columns.id == id).values(values)
                executed(connection, statement)
            return True
        except IntegrityError:
            # Or else it breaks a rule of the application's own table.
            taken = sa.select(columns.id).where(columns.id == to).with_for_update()
            if not executed(connection, taken).found():
                raise
            self.remove(connection, id)
            return False

    def remove(self, connection: Connection, id: str) -> None:
        """Delete a row."""
        executed(connection, sa.delete(self.table).where(self.table.c.id == id))

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
        return executed(connection, statement).changed

    def in_state(
        self, connection: Connection, name: str, after: Any, limit: int, *, is_group: bool
    ) -> Sequence[Any]:
        """Return some rows in a state, or in a group of states, by their ids."""
        is_in = _is_in(self.table.c.state, name, is_group)
        return self._by_id(connection, sa.select(self.table.c.id).where(is_in), after, limit)

    def with_states_in_data(self, connection: Connection, after: Any, limit: int) -> Sequence[Any]:
        """Return ids and data of rows of scenes' histories and of dialogs."""
        columns = self.table.c
        is_scene, is_dialog = columns.destiny == "scenes_history", columns.destiny.like("aiogd:%")
        statement: Any = sa.select(columns.id, columns.data).where(sa.or_(is_scene, is_dialog))
        return self._by_id(connection, statement, after, limit)

    def data_locked(self, connection: Connection, id: str) -> str | None:
        """Return the data of a row as it is by now, and lock it."""
        self._rows.begin(connection)
        statement = sa.select(self.table.c.data).where(self.table.c.id == id).with_for_update()
        data: str | None = executed(connection, statement).scalar()
        return data

    def set_data(self, connection: Connection, id: str, data: str) -> None:
        """Replace the data of a row that is locked. It is not written to: its time stays."""
        statement = sa.update(self.table).where(self.table.c.id == id)
        executed(connection, statement.values(data=data, **self._untouched))

    def _by_id(
        self, connection: Connection, statement: sa.Select[Any], after: Any, limit: int
    ) -> Sequence[Any]:
        """Return the rows that come after another one, None for the first, in the order of ids."""
        id = self.table.c.id
        if after is not None:
            statement = statement.where(id > after.id)
        return executed(connection, statement.order_by(id).limit(limit)).rows or ()

    def _own(self, where: Where) -> list[sa.ColumnElement[bool]]:
        """Return the conditions on the row itself, which hold when it is written, too."""
        columns = self.table.c
        conditions = [columns[name] == value for name, value in where.fields.items()]
        if all(value is None for value in where.fields.values()):
            conditions.append(columns.conversation.is_not(None))  # whose it is, is not known
        if where.states is not None:
            conditions.append(columns.state.in_(where.states))
        if where.idle_for is not None:
            conditions.append(columns.written_at <= Clock() - where.idle_for)
        if where.unhandled is not None:
            conditions.append(columns.idle_handled < where.unhandled)
        return conditions

    def _idle(self, where: Where) -> list[sa.ColumnElement[bool]]:
        """Return the condition on the other rows of the conversation, if there is one."""
        if where.idle_for is None:
            return []
        newer = self.table.alias("newer")
        since = Clock() - where.idle_for
        is_newer = sa.or_(newer.c.written_at > since, newer.c.written_at.is_(None))
        of_this = newer.c.conversation == self.table.c.conversation
        return [~sa.exists(sa.select(newer.c.id).where(of_this, is_newer))]

    def _still(self, where: Where, ids: Sequence[str]) -> list[sa.ColumnElement[bool]]:
        columns = self.table.c
        conditions = [columns.id.in_(ids), *self._own(where)]
        others = self._idle(where)
        if others:  # from a copy: MySQL does not write to a table that it reads
            found = sa.select(columns.id).where(columns.id.in_(ids), *others).subquery("found")
            conditions.append(columns.id.in_(sa.select(found.c.id)))
        return conditions


def _is_in(state: sa.Column[Any], name: str, is_group: bool) -> sa.ColumnElement[bool]:
    """Return the condition under which a state is the named one, or in that group or one in it."""
    if not is_group:
        return state == name
    escaped = name.replace(_ESCAPE, 2 * _ESCAPE).replace("%", r"\%").replace("_", r"\_")
    likes = [state.like(f"{escaped}{end}%", escape=_ESCAPE) for end in GROUP_ENDS]
    # SQLite's LIKE takes "a" and "A" for the same.
    return sa.and_(sa.or_(*likes), sa.func.substr(state, 1, len(name), type_=sa.String) == name)
