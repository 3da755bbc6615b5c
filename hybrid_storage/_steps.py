"""What is done to a batch of conversations at a time. For ``conversations.py`` and ``steering.py``.

A step is a function of a connection and of the last row of the batch before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from aiogram.fsm.storage.base import StateType, StorageKey
from sqlalchemy import Connection

from ._arguments import NO_COLUMNS
from ._codec import Codec, CorruptDataError
from ._sql.conversations import GROUP_ENDS, Conversations, Where
from ._sql.lookups import has_columns
from ._sql.rows import Rows
from .columns import key_of, values_of
from .finding import Filters, FoundConversation, conversation, found, names_of, where_of
from .keys import FullKeyBuilder

PAGE = 500  # rows that are read, or changed, at a time


@dataclass(frozen=True)
class Batch:
    """What was looked at, and how many of it were changed."""

    rows: Sequence[Any]
    changed: int


Step: TypeAlias = Callable[[Any, Connection], Batch]
"""Does one batch. Gets the last row of the batch before, None for the first."""


class Steps:
    """Makes functions of a connection out of filters and names of states."""

    def __init__(self, rows: Rows, codec: Codec, expires_after: float | None) -> None:
        """Remember what to use."""
        self._table = rows.table
        self._sql = Conversations(rows)
        self._codec = codec
        self._expires_after = expires_after

    def where(self, what: str, filters: Filters, *, is_change: bool = False) -> Where:
        """Return what to find; see :func:`where_of`."""
        self.check(what)
        return where_of(what, filters, is_change=is_change)

    def check(self, what: str) -> None:
        """Refuse what needs the columns, on a table that lacks them.

        :raises ValueError: naming the table, and what to do
        """
        if not has_columns(self._table):
            raise ValueError(NO_COLUMNS.format(f"{what}()", self._table.fullname))

    def found(self, rows: Sequence[Any]) -> list[FoundConversation]:
        """Return the conversations of rows."""
        return found(rows, self._codec)

    def row(self, connection: Connection, key: StorageKey) -> Any:
        """Return the row of a key, None if there is none."""
        return self._sql.row(connection, self._codec.row(key))

    def one(self, key: StorageKey, row: Any) -> FoundConversation:
        """Return the conversation of a key."""
        return conversation(key, row, self._codec)

    def page(self, connection: Connection, where: Where, after: Any) -> Sequence[Any]:
        """Return the next rows."""
        return self._sql.page(connection, where, after, PAGE)

    def count(self, connection: Connection, where: Where) -> dict[str | None, int]:
        """Return how many rows there are in each state."""
        return self._sql.count(connection, where)

    def changing_states(self, state: StateType, filters: Filters) -> Step:
        """Return the step that sets the state of some rows."""
        where, name = self.where("change_states", filters, is_change=True), self._codec.state(state)

        def step(after: Any, connection: Connection) -> Batch:
            rows = self.page(connection, where, after)
            ids = [row.id for row in rows]
            return Batch(rows, self._sql.set_state(connection, where, ids, name) if ids else 0)

        return step

    def clearing(self, filters: Filters) -> Step:
        """Return the step that deletes some conversations, with all their rows."""
        where = _of_any_row(self.where("clear_all", filters, is_change=True), filters)

        def step(after: Any, connection: Connection) -> Batch:
            rows = self.page(connection, where, after)
            if not rows:
                return Batch(rows, 0)
            names = sorted({row.conversation for row in rows})
            before = self._sql.locked(connection, names)
            self._sql.delete(connection, where, [row.id for row in rows if row.id in before])
            left = self._sql.locked(connection, names)  # changed by others meanwhile
            gone = {row.conversation for row in rows if row.id in before - left}
            self._sql.delete_conversations(connection, sorted(gone))
            return Batch(rows, len(gone))

        return step

    def renaming(self, old: object, new: object, is_group: bool) -> list[Step]:
        """Return the steps that rename the state of some rows, and in the data of some."""
        self.check("rename_state")
        before, after_, of_groups = names_of(old, new)
        names = before, after_, is_group or of_groups
        return [partial(self._rename, *names), partial(self._rename_in_data, *names)]

    def idle(self, after: float, filters: Filters) -> Where:
        """Return what to find of conversations whose idleness has not been dealt with."""
        if "idle_for" in filters:
            raise TypeError("on_idle() takes the seconds as after=")
        where = _of_any_row(self.where("on_idle", filters), filters)
        return replace(where, idle_for=after, unhandled=after)

    def handled(self, connection: Connection, key: StorageKey, after: float) -> None:
        """Mark a conversation's idleness as dealt with."""
        self._sql.handled(connection, self._codec.conversation(key), after)

    def is_still(self, connection: Connection, where: Where, key: StorageKey) -> bool:
        """Tell whether a conversation is still to be found."""
        fields = {**where.fields, "conversation": self._codec.conversation(key)}
        return bool(self._sql.page(connection, replace(where, fields=fields), None, 1))

    def forgetting(self, user_id: int, bot_id: int | None) -> Step:
        """Return the step that deletes some rows of a user's."""
        return partial(self._delete, self._of("forget_user", user_id=user_id, bot_id=bot_id))

    def purging(self) -> Step:
        """Return the step that deletes some rows that have expired."""
        self.check("purge")
        if self._expires_after is None:
            raise ValueError(
                "purge() deletes what has expired, and this storage's conversations do not: pass "
                "expires_after to it, or call clear_all(idle_for=...)"
            )
        expired = Where(idle_for=self._expires_after)
        return partial(self._delete, expired)

    def moving(self, old: int, new: int, bot_id: int | None) -> Step:
        """Return the step that gives some rows of a chat its new id."""
        where = self._of("move_chat", chat_id=old, bot_id=bot_id)
        if not isinstance(new, int) or new == old:
            raise ValueError(
                f"move_chat() takes two different ids of a chat, not {old!r} and {new!r}"
            )

        def step(after: Any, connection: Connection) -> Batch:
            rows = self.page(connection, where, after)
            moved = 0
            for name in dict.fromkeys(row.conversation for row in rows):
                moved += self._move(connection, self._sql.of(connection, name, where), old, new)
            return Batch(rows, moved)

        return step

    def _move(self, connection: Connection, rows: Sequence[Any], old: int, new: int) -> int:
        """Move all rows of a conversation, or none if there is one in the new chat already."""
        moved = 0
        is_taken: bool | None = None
        for row in rows:
            key = key_of(row)
            assert key is not None  # found by its chat
            # With FSMStrategy.CHAT, the chat stands in the user's place.
            user_id = new if key.user_id == old else key.user_id
            key = replace(key, chat_id=new, user_id=user_id)
            values = values_of(key, self._codec.conversation(key))
            to = values["conversation"]
            if is_taken is None:
                is_taken = to != row.conversation and self._sql.is_there(connection, to)
            if is_taken:
                self._sql.remove(connection, row.id)
            else:
                moved += self._sql.move(connection, row.id, self._codec.row(key), values)
        return moved

    def filling(self, parse: Callable[[str], StorageKey] | None, written_now: bool) -> Step:
        """Return the step that fills the columns of some rows."""
        self.check("fill_columns")
        parse = parse or FullKeyBuilder().parse

        def step(after: Any, connection: Connection) -> Batch:
            rows = self._sql.unfilled(connection, after, PAGE)
            filled = 0
            for row in rows:
                try:
                    key = parse(row.id)
                    if self._codec.row(key) != row.id:
                        continue
                except ValueError:
                    continue  # another key builder's; left as it is, and told by the number
                values = values_of(key, self._codec.conversation(key))
                self._sql.fill(connection, row.id, values, is_written=written_now)
                filled += 1
            return Batch(rows, filled)

        return step

    def _of(self, what: str, *, bot_id: int | None, **fields: int) -> Where:
        self.check(what)
        if bot_id is not None:
            fields["bot_id"] = bot_id
        for name, value in fields.items():
            if not isinstance(value, int):
                raise TypeError(f"{what}() takes a number as {name}, not {value!r}")
        return Where(fields)

    def _delete(self, where: Where, after: Any, connection: Connection) -> Batch:
        rows = self._sql.page_to_delete(connection, where, after, PAGE)
        ids = [row.id for row in rows]
        return Batch(rows, self._sql.delete(connection, where, ids) if ids else 0)

    def _rename(
        self, old: str, new: str, is_group: bool, after: Any, connection: Connection
    ) -> Batch:
        rows = self._sql.in_state(connection, old, after, PAGE, is_group=is_group)
        changed = 0
        if rows:
            ids = [row.id for row in rows]
            changed = self._sql.rename_state(connection, ids, old, new, is_group=is_group)
        return Batch(rows, changed)

    def _rename_in_data(
        self, old: str, new: str, is_group: bool, after: Any, connection: Connection
    ) -> Batch:
        rows = self._sql.with_states_in_data(connection, after, PAGE)
        changed = 0
        for id, text in rows:
            if self._renamed(id, text, old, new, is_group) is None:
                continue
            # What the bot writes meanwhile is read once more, and not lost.
            text = self._renamed(id, self._sql.data_locked(connection, id), old, new, is_group)
            if text is not None:
                self._sql.set_data(connection, id, text)
                changed += 1
        return Batch(rows, changed)

    def _renamed(self, id: str, text: str | None, *names: Any) -> str | None:
        """Return the text of data with another state, None if the state is not in it."""
        try:
            data = self._codec.load(id, text)
        except CorruptDataError:
            return None  # whoever reads it is told
        return self._codec.dump(data) if _renames(data, *names) else None


def _of_any_row(where: Where, filters: Filters) -> Where:
    """Return what to find of conversations, whatever rows they have, be it those of dialogs."""
    if {"state", "destiny"} & set(filters):
        return where
    return replace(where, fields={n: v for n, v in where.fields.items() if n != "destiny"})


def _renames(data: Any, old: str, new: str, is_group: bool) -> bool:
    """Rename the state in data of scenes or of a dialog, and tell whether it was there."""
    if not isinstance(data, dict):
        return False
    history = data.get("history")
    entries = [data, *(history if isinstance(history, list) else [])]
    changed = False
    for entry in entries:
        state = entry.get("state") if isinstance(entry, dict) else None
        if not isinstance(state, str):
            continue
        if state == old and not is_group:
            entry["state"] = new
        elif is_group and state.startswith(tuple(old + end for end in GROUP_ENDS)):
            entry["state"] = new + state[len(old) :]
        else:
            continue
        changed = True
    return changed
