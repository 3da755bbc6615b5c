"""Scopes: what makes the storage's calls of a task join a session.

A scope is open while its ``async with`` block runs. Tasks started inside inherit it and take turns,
since a session is not for concurrent use. A task that outlives the scope gets sessions of its own
again; other tasks never see it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from anyio import Lock
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.orm import Session, SessionTransaction

from ._cancellation import completed
from ._runners import carry, synchronous

if TYPE_CHECKING:
    from ._runners import AnySession

T = TypeVar("T")


class ScopeClosed(Exception):
    """The scope ended before the call's turn came. The call has not begun."""


class Scope:
    """A session that calls join."""

    def __init__(self, session: AnySession) -> None:
        """Remember the session.

        :param session: a session of either kind
        """
        self.session = session
        self.is_open = True
        self._lock = Lock(fast_acquire=True)

    async def run(self, function: Callable[[Session], T]) -> T:
        """Call a function with the session, after the calls that came before.

        :param function: gets the synchronous session; may be called in a worker thread
        :raises ScopeClosed: if the scope has ended
        :return: what the function returns
        """
        async with self._lock:
            if not self.is_open:
                raise ScopeClosed
            return await carry(self.session, partial(function, synchronous(self.session)))

    async def close(self) -> None:
        """End the scope, after the call that is under way: the session is the caller's again."""
        if self._lock.statistics().locked:
            await completed(self._close_in_turn())
        self.is_open = False

    async def _close_in_turn(self) -> None:
        async with self._lock:
            self.is_open = False

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """Undo what is done inside, and only that, if it ends with an exception."""
        savepoint = await self.run(_begin_nested)
        try:
            yield
        except BaseException:
            await completed(self.run(lambda _: savepoint.rollback()))
            raise
        await completed(self.run(lambda _: savepoint.commit()))


def _begin_nested(session: Session) -> SessionTransaction:
    connection = session.connection()
    if isinstance(connection.dialect, SQLiteDialect):
        # Python's driver begins a transaction before the first write only. A savepoint before
        # that would be the transaction itself, and its release would commit.
        driver_connection = connection.connection.driver_connection
        if driver_connection is not None and not driver_connection.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    return session.begin_nested()
