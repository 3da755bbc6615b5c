"""The storage's operations as plain functions on a synchronous ``Session``.

This is the storage's whole behaviour; the rest only decides how a call reaches the database:

* ``Operations`` (here) turns keys, states and data into text and back,
* ``_rows.py`` holds the statements, and ``_statements.py`` runs them,
* ``storage.py`` has the same operations run for aiogram, on connections of its own,
* ``_runners.py`` carries them there: in a greenlet or in a thread.

Synchronous code calls them with the session it has, asynchronous code hands them to
``AsyncSession.run_sync``. Either way they commit and roll back with everything else in there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, overload

from aiogram.fsm.storage.base import StateType, StorageKey
from sqlalchemy.orm import Session

from ._codec import Codec
from ._rows import Rows


class Operations:
    """Reads and writes the state of conversations in a session of the caller's.

    No operation commits, rolls back or flushes; the writes become visible to others when the
    caller commits, and lock the conversation's row until then. Get one as
    ``storage.operations``. The errors are those of the storage's methods of the same names.
    """

    def __init__(self, rows: Rows, codec: Codec) -> None:
        self._rows = rows
        self._codec = codec

    def get_state(self, session: Session, key: StorageKey) -> str | None:
        """Return the state of a conversation.

        :param session: the session to read in
        :param key: the conversation's key
        :return: the state's name, None if there is none
        """
        row = self._codec.row(key)
        return self._rows.to_read(session).perform(partial(self._rows.get_state, row=row))

    def set_state(self, session: Session, key: StorageKey, state: StateType = None) -> None:
        """Set or remove the state of a conversation.

        :param session: the session to write in
        :param key: the conversation's key
        :param state: the state or its name; None removes it
        """
        row, name = self._codec.row(key), self._codec.state(state)
        self._rows.to_write(session).perform(partial(self._rows.set_state, row=row, state=name))

    def get_data(self, session: Session, key: StorageKey) -> dict[str, Any]:
        """Return the data of a conversation.

        :param session: the session to read in
        :param key: the conversation's key
        :return: the data, empty if there is none
        """
        row = self._codec.row(key)
        text = self._rows.to_read(session).perform(partial(self._rows.get_data, row=row))
        return self._codec.load(key, text)

    def set_data(self, session: Session, key: StorageKey, data: Mapping[str, Any]) -> None:
        """Replace the data of a conversation.

        :param session: the session to write in
        :param key: the conversation's key
        :param data: the new data; an empty one removes it
        """
        row, text = self._codec.row(key), self._codec.dump(data)
        self._rows.to_write(session).perform(partial(self._rows.set_data, row=row, data=text))

    @overload
    def get_value(self, session: Session, key: StorageKey, name: str) -> Any | None: ...
    @overload
    def get_value(self, session: Session, key: StorageKey, name: str, default: Any) -> Any: ...
    def get_value(self, session: Session, key: StorageKey, name: str, default: Any = None) -> Any:
        """Return one field of a conversation's data.

        :param session: the session to read in
        :param key: the conversation's key
        :param name: the field's name
        :param default: returned where there is no such field
        """
        return self.get_data(session, key).get(name, default)

    def update_data(
        self, session: Session, key: StorageKey, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Change fields of a conversation's data, losing none that others change meanwhile.

        :param session: the session to write in
        :param key: the conversation's key
        :param data: the fields to set, as in ``dict.update``
        :return: the whole data, as stored
        """
        changes = self._codec.dump(data)
        row = self._codec.row(key)
        if not changes:
            return self.get_data(session, key)
        merge = self._codec.merge(key, changes)
        self._rows.to_write(session).perform(partial(self._rows.update_data, row=row, merge=merge))
        return merge.data

    def clear(self, session: Session, key: StorageKey) -> None:
        """Remove state and data of a conversation.

        :param session: the session to write in
        :param key: the conversation's key
        """
        row = self._codec.row(key)
        self._rows.to_write(session).perform(partial(self._rows.clear, row=row))
