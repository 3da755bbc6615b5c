"""The storage's operations as plain functions on a synchronous ``Session``.

This is the storage's whole behaviour; the rest only decides how a call reaches the database:

* ``Calls`` (here) turns a key, a state or data into text, and picks the function of ``_sql/`` that
  says it to the database,
* ``ConversationOperations`` (here) runs these calls in a session of the application's,
* ``storage.py`` has the same calls run for aiogram, on connections of its own,
* ``_engine/runner.py`` carries them there: in a thread or in a greenlet.

Synchronous code uses the operations with the session it has, asynchronous code hands them to
``AsyncSession.run_sync``. Either way they commit and roll back with everything else in there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

from aiogram.fsm.storage.base import StateType, StorageKey
from sqlalchemy import Connection, inspect
from sqlalchemy.orm import Session, scoped_session

from ._codec import Change, Codec
from ._engine.calls import Call
from ._sql.changes import Change as TextChange
from ._sql.changes import ChangedRow
from ._sql.lookups import Row, columns_of
from ._sql.rows import Rows
from .columns import values_of
from .model import FSMData

T = TypeVar("T")

AnySync: TypeAlias = Session | scoped_session[Any]


class Calls:
    """Makes calls of keys, states and data; what is wrong with these is raised here."""

    def __init__(self, model: type[FSMData], rows: Rows, codec: Codec) -> None:
        """Remember what to use.

        :param model: the mapped class, by which a session may choose its engine
        :param rows: the statements on its table
        :param codec: translates keys, states and data
        """
        self._rows = rows
        self._codec = codec
        # What the ORM passes when it looks for a statement's engine: Session(binds=...) works.
        self.bind_arguments: dict[str, Any] = {"mapper": inspect(model)}
        self._to_read: dict[str, Any] = {**self.bind_arguments, "clause": rows.select_data}
        self.to_write: dict[str, Any] = {**self.bind_arguments, "clause": rows.replace_data}

    def get_state(self, key: StorageKey) -> Call[str | None]:
        """Return the call that reads a state."""
        row = self._codec.row(key)
        return self.reading(
            row, partial(self._rows.get_state, row=row), lambda changed: changed.now.state
        )

    def get_data(self, key: StorageKey) -> Call[dict[str, Any]]:
        """Return the call that reads data."""
        row = self._codec.row(key)
        return self.reading(
            row,
            lambda connection: self._codec.load(key, self._rows.get_data(connection, row)),
            lambda changed: self._codec.load(key, changed.now.data),
        )

    def set_state(self, key: StorageKey, state: StateType) -> Call[None]:
        """Return the call that sets or removes a state."""
        row, name = self.row(key), self._codec.state(state)
        function = partial(self._rows.set_state, row=row, state=name)
        return self.writing(row, function, lambda changed: changed.set_state(name))

    def set_data(self, key: StorageKey, data: Mapping[str, Any]) -> Call[None]:
        """Return the call that replaces data."""
        row, text = self.row(key), self._codec.dump(data)
        function = partial(self._rows.set_data, row=row, data=text)
        return self.writing(row, function, lambda changed: changed.set_data(text))

    def update_data(self, key: StorageKey, data: Mapping[str, Any]) -> Call[dict[str, Any]]:
        """Return the call that changes fields of data, and returns the whole."""
        changes = self._codec.dump(data)
        if not changes:
            return self.get_data(key)
        return self._changing(key, lambda old: {**old, **self._codec.load(key, changes)})

    def change_data(self, key: StorageKey, function: Change) -> Call[dict[str, Any]]:
        """Return the call that replaces data by what a function makes of it."""
        if not callable(function):
            raise TypeError(f"change_data() takes a function of the data, not {function!r}")
        return self._changing(key, function)

    def _changing(self, key: StorageKey, function: Change) -> Call[dict[str, Any]]:
        row = self.row(key)

        def changed_by(update: Callable[[TextChange], None]) -> dict[str, Any]:
            data: dict[str, Any] = {}

            def merge(text: str | None) -> str:
                nonlocal data
                new = self._codec.dump(function(self._codec.load(key, text)))
                # Parsed anew: nothing of the caller's own objects gets into the result.
                data = self._codec.load(key, new)
                return new

            update(merge)
            return data

        return self.writing(
            row,
            lambda connection: changed_by(partial(self._rows.update_data, connection, row)),
            lambda changed: changed_by(changed.update_data),
            in_transaction=self._rows.needs_transaction,
        )

    def clear(self, key: StorageKey) -> Call[None]:
        """Return the call that removes a row."""
        row = self.row(key)
        function = partial(self._rows.clear, row=row.id)
        return self.writing(row, function, ChangedRow.clear)

    def reading(
        self,
        row: str,
        function: Callable[[Connection], T],
        in_unit: Callable[[ChangedRow], T] | None = None,
    ) -> Call[T]:
        """Return a call that reads."""
        table = self._rows.table.fullname
        return Call(function, self._to_read, row, table, writes=False, in_unit=in_unit)

    def row(self, key: StorageKey) -> Row:
        """Return the row of a key, and what its columns to look by are filled with."""
        id = self._codec.row(key)
        if not self._rows.lookups.values:
            return Row(id, {})
        return Row(id, columns_of(values_of(key, self._codec.conversation(key))))

    def writing(
        self,
        row: Row | str,
        function: Callable[[Connection], T],
        in_unit: Callable[[ChangedRow], T] | None = None,
        *,
        in_transaction: bool = False,
    ) -> Call[T]:
        """Return a call that writes."""
        id, columns = (row, {}) if isinstance(row, str) else row
        return Call(
            function,
            self.to_write,
            id,
            self._rows.table.fullname,
            in_transaction=in_transaction,
            in_unit=in_unit,
            columns=columns,
        )


class ConversationOperations:
    """Reads and writes the state of conversations in a session of the caller's.

    No operation commits, rolls back or flushes; the writes become visible to others when the
    caller commits, and lock the conversation's row until then. Get one as
    ``storage.operations``. The errors are those of the storage's methods of the same names.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def get_state(self, session: AnySync, key: StorageKey) -> str | None:
        """Return the state of a conversation.

        :param session: the session to read in
        :param key: the conversation's key
        :return: the state's name, None if there is none
        """
        return run(session, self._calls.get_state(key))

    def set_state(self, session: AnySync, key: StorageKey, state: StateType = None) -> None:
        """Set or remove the state of a conversation.

        :param session: the session to write in
        :param key: the conversation's key
        :param state: the state or its name; None removes it
        """
        run(session, self._calls.set_state(key, state))

    def get_data(self, session: AnySync, key: StorageKey) -> dict[str, Any]:
        """Return the data of a conversation.

        :param session: the session to read in
        :param key: the conversation's key
        :return: the data, empty if there is none
        """
        return run(session, self._calls.get_data(key))

    def set_data(self, session: AnySync, key: StorageKey, data: Mapping[str, Any]) -> None:
        """Replace the data of a conversation.

        :param session: the session to write in
        :param key: the conversation's key
        :param data: the new data; an empty one removes it
        """
        run(session, self._calls.set_data(key, data))

    @overload
    def get_value(self, session: AnySync, key: StorageKey, name: str) -> Any | None: ...
    @overload
    def get_value(self, session: AnySync, key: StorageKey, name: str, default: Any) -> Any: ...
    def get_value(self, session: AnySync, key: StorageKey, name: str, default: Any = None) -> Any:
        """Return one field of a conversation's data.

        :param session: the session to read in
        :param key: the conversation's key
        :param name: the field's name
        :param default: returned where there is no such field
        """
        return self.get_data(session, key).get(name, default)

    def update_data(
        self, session: AnySync, key: StorageKey, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Change fields of a conversation's data, losing none that others change meanwhile.

        :param session: the session to write in
        :param key: the conversation's key
        :param data: the fields to set, as in ``dict.update``
        :return: the whole data, as stored
        """
        return run(session, self._calls.update_data(key, data))

    def change_data(self, session: AnySync, key: StorageKey, function: Change) -> dict[str, Any]:
        """Replace the data of a conversation by what a function makes of it.

        :param session: the session to write in
        :param key: the conversation's key
        :param function: gets the data and returns the new data. It may be called more than once, so
            it must do nothing else
        :return: the new data, as stored
        """
        return run(session, self._calls.change_data(key, function))

    def remove_data(self, session: AnySync, key: StorageKey, *names: str) -> dict[str, Any]:
        """Remove fields of a conversation's data.

        :param session: the session to write in
        :param key: the conversation's key
        :param names: the fields; those that are not there do no harm
        :return: the rest of the data
        """
        return self.change_data(session, key, without(*names))

    def clear(self, session: AnySync, key: StorageKey) -> None:
        """Remove state and data of a conversation.

        :param session: the session to write in
        :param key: the conversation's key
        """
        run(session, self._calls.clear(key))


def without(*names: str) -> Change:
    """Return the function that leaves fields out of data."""
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"remove_data() takes names of fields, not {name!r}")
    return lambda data: {name: value for name, value in data.items() if name not in names}


def run(session: AnySync, call: Call[T]) -> T:
    """Run a call in a session of the caller's."""
    own: object = session() if isinstance(session, scoped_session) else session
    if hasattr(own, "sync_session"):
        raise TypeError(
            "an AsyncSession runs the operation itself: "
            "await session.run_sync(storage.operations.get_state, key)"
        )
    if not isinstance(own, Session):
        raise TypeError(
            f"an operation takes a Session that you have opened, not {own!r}: "
            "with SessionLocal() as session: storage.operations.get_state(session, key)"
        )
    # Not session.execute(), which would flush the session's pending objects first.
    return call.run(own.connection(dict(call.bind_arguments)))
