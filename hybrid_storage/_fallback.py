"""The storage used before: conversations that are not here yet are read from it, and moved here.

Three steps, in this order, so that a process may be killed between any two of them:

1. The conversation is read there, and inserted here unless it is here. What was read is compared
   with what is there once the row is locked, so that nothing outdated is inserted.
2. That is committed.
3. It is removed there. Only then does the call that has asked go on.

So a conversation that was changed or cleared here is not there any more, and cannot come back.
A process that is killed before step 3 leaves the conversation in both places: what is here counts,
and the next to ask does step 3.

Inside a transaction of the application's, step 2 is the application's, and step 3 follows its
commit, or is done by the next call outside. Until then the conversation stays there, and here is a
row for it: an empty one if it was cleared.
For ``storage.py``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from aiogram.fsm.storage.base import BaseStorage, KeyBuilder, StorageKey
from sqlalchemy import Connection

from ._codec import Codec
from ._engine.access import Access
from ._engine.calls import Call
from ._engine.errors import in_short
from ._engine.retries import logger, with_retries
from ._sql.absent import AbsentRows
from ._sql.changes import Texts
from ._sql.rows import Rows
from .operations import Calls
from .unit_of_work import UnitsOfWork

_REMEMBERED = 100_000  # keys of which it is known that they are not there any more
_EMPTY_ROW = Texts(None, "")


class _Changed(Exception):
    """Another process has moved the conversation since it was read."""


class Fallback:
    """Moves conversations here from the storage used before, when they are first asked for."""

    def __init__(
        self,
        old: BaseStorage,
        rows: Rows,
        calls: Calls,
        codec: Codec,
        access: Access,
        units: UnitsOfWork,
        transaction: Callable[[], AbstractAsyncContextManager[object]],
    ) -> None:
        """Remember what to use.

        :param old: the storage used before
        :param transaction: opens a transaction that takes no part in units of work
        :raises TypeError: if the former storage is not one
        """
        if not isinstance(old, BaseStorage):
            raise TypeError(f"fallback is a storage of aiogram's, a BaseStorage, not {old!r}")
        self._old = old
        self._rows = rows
        self._absent = AbsentRows(rows)
        self._calls = calls
        self._codec = codec
        self._access = access
        self._units = units
        self._transaction = transaction
        self._settled: dict[StorageKey, None] = {}
        self._pending: WeakKeyDictionary[Any, dict[StorageKey, str]] = WeakKeyDictionary()
        """What has been moved here in a session, and awaits its commit."""

    @asynccontextmanager
    async def adopted(self, key: StorageKey, call: Call[Any]) -> AsyncIterator[None]:
        """Have a conversation here before a call is made for it.

        :param key: the conversation's key
        :param call: the call that is made inside
        """
        if key in self._settled:
            yield
            return
        scope = self._access.scope()
        if scope is None:
            await self._settle(key, call.row)
            yield
        else:
            is_there = await self._adopt_joined(key, call.row)
            if is_there:
                self._pending.setdefault(scope.session, {})[key] = call.row
            yield
            if is_there and call.writes:
                # A conversation that is cleared must not come back with the next look there.
                unit = self._units.find(key)
                if unit is not None:
                    await unit.write()
                await self._write(call.row, partial(self._insert, key, _EMPTY_ROW))

    async def committed(self, session: object) -> None:
        """Remove there what a transaction has moved here.

        It is committed, so an error is nothing that it could take back: the next call goes on.

        :param session: the transaction's
        """
        for key, row in self._pending.pop(session, {}).items():
            try:
                await self._settle(key, row)
            except Exception as error:
                logger.warning("%r is here, and is not yet removed there: %s", row, in_short(error))

    async def _settle(self, key: StorageKey, row: str) -> None:
        """Move a conversation here, and remove it there."""
        retry_for, what = self._access.retry_for, f"moving {row!r} here from {self._old!r}"
        is_moved = False
        while not is_moved and not (texts := await self._read(key)).is_empty:
            read = self._calls.reading(row, partial(self._absent.read, rows=[row]))
            here = await self._access.execute(read)
            is_moved = row in here
            if not is_moved:
                with suppress(_Changed):
                    adopt = partial(self._adopt, key, row, texts)
                    await with_retries(adopt, retry_for, what, self._access.confirming(read))
                    is_moved = True
        if is_moved:
            self._read_anew(key)
            await self._old.set_state(key, None)
            await self._old.set_data(key, {})
            await self._write(row, partial(self._rows.delete_if_empty, row=row))
        self._remember(key)

    async def _adopt(self, key: StorageKey, row: str, texts: Texts) -> None:
        async with self._transaction():
            is_new = await self._write(row, partial(self._insert, key, texts))
            if is_new and await self._read(key) != texts:
                raise _Changed

    async def _adopt_joined(self, key: StorageKey, row: str) -> bool:
        """Do the same in the transaction that this task has joined; leave it there.

        :return: whether the conversation is there
        """
        while not (texts := await self._read(key)).is_empty:
            is_new = await self._write(row, partial(self._insert, key, texts))
            if not is_new or await self._read(key) == texts:
                self._read_anew(key)
                return True
            await self._write(row, partial(self._absent.delete, rows=[row]))
        self._remember(key)
        return False

    async def _read(self, key: StorageKey) -> Texts:
        builder = getattr(self._old, "key_builder", None)
        if isinstance(builder, KeyBuilder):
            try:
                builder.build(key)
            except ValueError:  # aiogram's, for a destiny: it can hold no such conversation
                return Texts()
        state = self._codec.state(await self._old.get_state(key))
        return Texts(state, self._codec.dump(await self._old.get_data(key)))

    def _read_anew(self, key: StorageKey) -> None:
        unit = self._units.find(key)
        if unit is not None:
            unit.forget()

    def _insert(self, key: StorageKey, texts: Texts, connection: Connection) -> bool:
        row, columns = self._calls.row(key)
        return bool(self._absent.insert(connection, {row: texts}, {row: columns}))

    async def _write(self, row: str, function: Callable[[Connection], Any]) -> Any:
        return await self._access.execute(self._calls.writing(row, function))

    def _remember(self, key: StorageKey) -> None:
        self._settled[key] = None
        if len(self._settled) > _REMEMBERED:
            self._settled.pop(next(iter(self._settled)), None)
