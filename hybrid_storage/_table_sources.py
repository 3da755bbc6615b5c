"""Tables that conversations come from: ours, aiogram-sqlalchemy-storage's and raito's.

For ``migration.py``, which has the public names.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from aiogram.fsm.storage.base import StorageKey

from ._sources import MODULE, Conversation, Refused, parser_of, read_one
from ._sql.results import executed
from .keys import NUMBER, Parse
from .storage import SQLAlchemyStorage


class _OfRows(ABC):
    """A source of which each row is a conversation."""

    def __init__(self, storage: SQLAlchemyStorage, table: sa.Table, key: str) -> None:
        self.storage = storage
        name = table.c[key]
        self._name = f"all of {table.fullname}"
        page = sa.select(name).order_by(name).limit(sa.bindparam("_batch"))
        self._first: Any = page
        self._next: Any = page.where(name > sa.bindparam("_last"))
        these = name.in_(sa.bindparam("_names", expanding=True))
        self._select: Any = sa.select(name, table.c.state, table.c.data).where(these)

    async def names(self, batch: int) -> AsyncIterator[Sequence[str]]:
        """List the rows' ids. See :class:`Source`."""
        found = await self._rows(self._first, {"_batch": batch})
        while found:
            names = [name for (name,) in found]
            yield names
            found = await self._rows(self._next, {"_batch": batch, "_last": names[-1]})

    async def read(self, names: Sequence[str]) -> Sequence[Conversation | Refused]:
        """Return what the rows hold. See :class:`Source`."""
        return [
            read_one(name, partial(self._conversation, name, state, data))
            for name, state, data in await self._rows(self._select, {"_names": list(names)})
            if state is not None or data
        ]

    async def _rows(
        self, statement: sa.Executable, parameters: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        def rows(connection: sa.Connection) -> Sequence[Sequence[Any]]:
            return executed(connection, statement, parameters).rows or ()

        storage = self.storage
        return await storage._access.execute(storage._calls.reading(self._name, rows))

    @abstractmethod
    def _conversation(self, name: str, state: str | None, data: Any) -> Conversation:
        """Return what a row holds."""


class TableSource(_OfRows):
    """The conversations of a table of ours, or of aiogram-sqlalchemy-storage's, which is alike."""

    __module__ = MODULE

    def __init__(
        self, storage: SQLAlchemyStorage, *, bot_id: int | None = None, parse: Parse | None = None
    ) -> None:
        """Use a storage on the former table, with the key builder that has built its keys.

        :param storage: for a table of aiogram-sqlalchemy-storage, a ``SQLAlchemyStorage`` of this
            package with ``key_builder=DefaultKeyBuilder()``, unless the bot had another
        :param bot_id: the bot, if the keys do not say: ``DefaultKeyBuilder(with_bot_id=False)``
        :param parse: makes keys of text, for a key builder of your own
        :raises TypeError: if the key builder is your own and ``parse`` is missing
        """
        super().__init__(storage, storage.table, "id")
        self._parse = parser_of(storage.key_builder, bot_id, parse)

    def _conversation(self, name: str, state: str | None, data: str | None) -> Conversation:
        key = self._parse(name)
        return Conversation(name, key, state, self.storage._codec.load(key, data))


class RaitoSource(_OfRows):
    """The conversations of raito's ``SQLAlchemyStorage``, from its table ``raito__fsm_storage``."""

    __module__ = MODULE

    def __init__(
        self,
        storage: SQLAlchemyStorage,
        *,
        separator: str = ":",
        table_name: str = "raito__fsm_storage",
    ) -> None:
        """Read the table by the sessions of a storage.

        :param storage: a storage of this package on the table's database, such as the target
        :param separator: raito's ``key_separator``
        :param table_name: the table's name
        """
        columns = (sa.Column("key", sa.String), sa.Column("state", sa.String))
        table = sa.Table(table_name, sa.MetaData(), *columns, sa.Column("data", sa.JSON))
        super().__init__(storage, table, "key")
        self._separator = separator

    def _conversation(self, name: str, state: str | None, data: Any) -> Conversation:
        return Conversation(name, _parse_raito(name, self._separator), state, data or {})


def _parse_raito(text: str, separator: str) -> StorageKey:
    """Return the key of bot, chat and user, then topic, business connection and destiny if set."""
    first = re.match(f"({NUMBER}){re.escape(separator)}" * 3, text + separator)
    if first is None:
        raise ValueError(
            f"{text!r} does not begin with the numbers of bot, chat and user, separated by "
            f"{separator!r}"
        )
    rest = text[first.end() :].split(separator)
    thread_id = None
    if len(rest) > 1 and re.fullmatch("[1-9][0-9]*", rest[0]):
        thread_id = int(rest.pop(0))
    if len(rest) > 1:
        raise ValueError(
            f"{text!r} may be a key with a business connection, or one with a destiny that "
            f"contains the separator {separator!r}: raito's storage does not tell"
        )
    bot_id, chat_id, user_id = map(int, first.groups())
    return StorageKey(bot_id, chat_id, user_id, thread_id=thread_id, destiny=rest[0])
